"""Ids are SentencePiece's own, on any text, and come back as that text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemmakit.errors import InputError, TokenizerError, TokenOutOfRange

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
SNIPPETS = [
    "<start_of_turn>", "<end_of_turn>", "<mask>", "<unused7>", "[@BOS@]", "<b>", "</table>", "<0x41>", "<0xE2>", "  ",
    " " * 33, "\n" * 32, "\t\t", "▁", "▁▁", " ▁", "é", "e\u0301", "🙂", "👩‍👧", "漢字", "12345", "\0", "\r\n", "----",
    "=====", "ababab", "<start_of", "_turn>", "<bo", "s>", "the ", "return", "\u2028", "\ufeff", "\ud7ff", "\U0010ffff",
]  # fmt: skip
characters = st.characters(exclude_categories=("Cs",))
texts = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(characters, max_size=12)), max_size=25).map("".join)
ordinary = texts.filter(lambda text: not any(token in text for token in CONTROL))


def assert_ids_are_sentencepieces(text: str, sp: Any, *tokenizers: Any) -> None:
    expected = sp.encode(text)
    for tokenizer in tokenizers:
        assert tokenizer.encode(text, add_special_tokens=False) == expected


def test_slow_and_fast_equal_sentencepiece_on_a_million_characters(
    corpus: list[str], sp: Any, shared_slow: Any, shared_fast: Any
) -> None:
    expected = sp.encode(corpus)
    assert shared_slow(corpus, add_special_tokens=False)["input_ids"] == expected
    assert shared_fast(corpus, add_special_tokens=False)["input_ids"] == expected


def test_a_million_characters_as_one_text(corpus: list[str], sp: Any, shared_slow: Any, shared_fast: Any) -> None:
    assert_ids_are_sentencepieces("".join(corpus), sp, shared_slow, shared_fast)


@settings(max_examples=400, deadline=None)
@given(ordinary)
@example("\0")
@example("▁ ▁▁  ▁")
@example("")
def test_slow_and_fast_equal_sentencepiece_on_random_unicode(
    sp: Any, shared_slow: Any, shared_fast: Any, text: str
) -> None:
    assert_ids_are_sentencepieces(text, sp, shared_slow, shared_fast)


@settings(max_examples=300, deadline=None)
@given(st.text("ab-= \n▁", max_size=120))
def test_runs_of_few_characters_merge_as_sentencepiece_merges_them(
    sp: Any, shared_slow: Any, shared_fast: Any, text: str
) -> None:
    assert_ids_are_sentencepieces(text, sp, shared_slow, shared_fast)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_decode_gives_the_text_back(shared_slow: Any, shared_fast: Any, text: str) -> None:
    for tokenizer in (shared_slow, shared_fast):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        tokens = tokenizer.tokenize(text)
        assert tokenizer.convert_tokens_to_ids(tokens) == ids
        assert tokenizer.convert_tokens_to_string(tokens) == text.replace("▁", " ")


@pytest.mark.filterwarnings("ignore:the text already starts with the BOS")
@settings(max_examples=300, deadline=None)
@given(texts)
def test_slow_equals_fast_with_special_tokens_in_the_text(shared_slow: Any, shared_fast: Any, text: str) -> None:
    text = text + "<bos>x<eos> <pad><unk>" + text
    assert shared_slow(text) == shared_fast(text)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_split_special_tokens_leaves_no_special_id(shared_slow: Any, shared_fast: Any, text: str) -> None:
    text = text + "<bos><start_of_turn>" + text
    for tokenizer in (shared_slow, shared_fast):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_ids_decode_the_same_way(shared_slow: Any, shared_fast: Any, oracle: Any, data: Any) -> None:
    few = st.one_of(st.integers(0, 2047), st.integers(217, 472), st.sampled_from([0, 1, 2, 106, 107, 139]))
    ids = data.draw(st.lists(few, max_size=30))
    for skip in (False, True):
        expected = oracle.decode(ids, skip_special_tokens=skip)
        assert shared_slow.decode(ids, skip_special_tokens=skip) == expected
        assert shared_fast.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "🙂\udc00"])
def test_a_lone_surrogate_is_refused_by_name_and_place(both: Any, text: str) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D[89A-F]"):
        both(text)
    with pytest.raises(TokenizerError, match="lone surrogate"):
        both(["fine", text])


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a", 3], {"a": 1}])
def test_what_is_not_text_is_refused(both: Any, text: Any) -> None:
    with pytest.raises(InputError):
        both(text)


@pytest.mark.parametrize("index", [-1, 2048, 10**12])
def test_an_id_outside_the_vocabulary_is_named(both: Any, index: int) -> None:
    for call in (both.decode, both.convert_ids_to_tokens, both.incremental_decoder().push):
        with pytest.raises(TokenOutOfRange, match=str(index)):
            call([5, index])


def test_pieces_that_join_characters_which_are_no_pieces(model_path: Any, tmp_path: Any) -> None:
    """Tabs are bytes in Gemma's vocabulary, yet two of them can be one learned piece."""
    import sentencepiece

    from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast
    from gemmakit.text.vocabulary_files import ModelFile, Piece

    model = ModelFile.read(model_path)
    model.pieces = [piece for piece in model.pieces if piece.text != "\t"] + [
        Piece("\t\t", -0.5),
        Piece("\t\t\t\t", -0.7),
    ]
    path = tmp_path / "tabs.model"
    path.write_bytes(model.to_bytes())
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    slow, fast = GemmaTokenizer(path), GemmaTokenizerFast(path)
    for count in range(12):
        text = "a" + "\t" * count + "b\té\t\t🙂\t"
        expected = sp.encode(text)
        assert slow.encode(text, add_special_tokens=False) == expected
        assert fast.encode(text, add_special_tokens=False) == expected
        assert fast.decode(expected) == slow.decode(expected) == text
