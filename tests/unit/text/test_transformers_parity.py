"""What transformers' GemmaTokenizer returns, both of ours return."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmakit.errors import InputError

TEXTS = [
    "Hello  world, this is a test.",
    "",
    "def f(x):\n    return x\n\n\n",
    "漢字 🙂 é",
    "a <start_of_turn> b <eos> c",
]
OTHERS = ["second", "the other text is longer than the first one", "", "x y z", "12345"]


def plain(output: Any) -> dict[str, Any]:
    """Offsets are lists in one and tuples in the other; nothing else may differ."""

    def row(values: Any) -> Any:
        return (
            [tuple(value) if isinstance(value, list) else value for value in values]
            if isinstance(values, list)
            else values
        )

    return {key: [row(values) for values in rows] for key, rows in dict(output).items()}


def same(ours: Any, theirs: Any, *args: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert plain(ours(*args, **options)) == plain(theirs(*args, **options)), (args, options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("eos", [False, True])
def test_calls_return_what_transformers_returns(either: Any, oracle: Any, side: str, eos: bool) -> None:
    either.truncation_side = oracle.truncation_side = side
    either.add_eos_token = oracle.add_eos_token = eos
    oracle.add_bos_token = True  # it forgets this when the other is set
    extras = {"return_token_type_ids": True, "return_special_tokens_mask": True, "return_length": False}
    try:
        for padding, cut, length in itertools.product((False, True, "max_length"), (False, True), (5, 12, 40)):
            for padding_side in ("left", "right"):
                options = {"padding": padding, "truncation": cut, "max_length": length, "padding_side": padding_side}
                same(either, oracle, TEXTS, **options, **extras)
                same(either, oracle, TEXTS, OTHERS, **options, **extras)
                same(either, oracle, list(zip(TEXTS, OTHERS, strict=True)), **options, **extras)
                same(either, oracle, TEXTS[0], **options, **extras)
                same(either, oracle, TEXTS, **options, add_special_tokens=False)
    finally:
        oracle.truncation_side, oracle.add_eos_token = "right", False


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_pairs_are_cut_as_transformers_cuts_them(both: Any, oracle: Any, strategy: str) -> None:
    first, second = (
        "the first of the two texts is long enough",
        "and the second is as long as the first one is, or longer",
    )
    for length in range(45, 8, -1):
        same(both, oracle, first, second, truncation=strategy, max_length=length) if _fits(
            both, first, second, strategy, length
        ) else None
        if strategy == "longest_first":
            same(both, oracle, second, first, truncation=strategy, max_length=length)


def _fits(tokenizer: Any, first: str, second: str, strategy: str, length: int) -> bool:
    kept = second if strategy == "only_first" else first
    return strategy == "longest_first" or len(tokenizer.encode(kept)) + 2 <= length


def test_offsets_special_masks_and_overflow(shared_fast: Any, oracle: Any) -> None:
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    same(shared_fast, oracle, TEXTS, **options)
    same(shared_fast, oracle, TEXTS, OTHERS, padding=True, **options)
    for length, stride in itertools.product((3, 4, 7, 12), (0, 1, 2)):
        if stride < length - 1:
            cut = {"truncation": True, "max_length": length, "stride": stride, "return_overflowing_tokens": True}
            same(shared_fast, oracle, TEXTS, **cut, **options)
            same(shared_fast, oracle, TEXTS[0], **cut, padding=True, **options)


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_cut_of_pairs_makes_rows_as_in_transformers(
    shared_slow: Any, shared_fast: Any, oracle: Any, strategy: str, side: str
) -> None:
    """From either tokenizer: transformers' slow ones give what is left over under another name, of one text alone."""
    first, second = "the first of the two texts is long", "and the second is as long as the first is, or longer"
    options = {"return_special_tokens_mask": True, "return_token_type_ids": True, "return_overflowing_tokens": True}
    tokenizers = (shared_slow, shared_fast, oracle)
    for tokenizer in tokenizers:
        tokenizer.truncation_side = side
    try:
        for length, stride in itertools.product((26, 31, 60), (0, 2)):
            cut = {"truncation": strategy, "max_length": length, "stride": stride, "padding": True}
            if not _fits(shared_fast, first, second, strategy, length):
                continue
            for tokenizer in tokenizers[:2]:
                same(tokenizer, oracle, first, second, **cut, **options)
                same(tokenizer, oracle, [first, "a"], [second, "b"], **cut, **options)
            same(shared_fast, oracle, first, second, **cut, **options, return_offsets_mapping=True)
    finally:
        for tokenizer in tokenizers:
            tokenizer.truncation_side = "right"


@pytest.mark.parametrize("pair", [None, TEXTS[2]])
def test_ids_are_prepared_as_their_text_is(both: Any, pair: str | None) -> None:
    ids, pair_ids = (None if t is None else both.encode(t, add_special_tokens=False) for t in (TEXTS[0], pair))
    for options in ({}, {"max_length": 9, "truncation": True}, {"max_length": 40, "padding": "max_length"}):
        expected = both(TEXTS[0], pair, return_special_tokens_mask=True, **options)
        assert both.prepare_for_model(ids, pair_ids, return_special_tokens_mask=True, **options) == expected
        for axis in (False, True):
            made = both.prepare_for_model(ids, pair_ids, return_tensors="pt", prepend_batch_axis=axis, **options)
            assert made.input_ids.tolist() == ([expected["input_ids"]] if axis else expected["input_ids"])
    for wrong in ({"return_offsets_mapping": True}, {"no_such": 1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            both.prepare_for_model(ids, **wrong)


def test_words_of_a_split_text(both: Any, oracle: Any) -> None:
    words = [["Hello", " world"], ["one", "", "two three"]]
    same(both, oracle, words, is_split_into_words=True)
    same(both, oracle, words[0], is_split_into_words=True)
    assert both(words, is_split_into_words=True, padding=True).word_ids(0)[-1] == 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=40), min_size=1, max_size=4))
def test_any_batch(shared_slow: Any, shared_fast: Any, oracle: Any, texts: list[str]) -> None:
    expected = plain(oracle(texts, padding=True, pad_to_multiple_of=4))
    for tokenizer in (shared_slow, shared_fast):
        assert plain(tokenizer(texts, padding=True, pad_to_multiple_of=4)) == expected
        assert tokenizer.tokenize(texts[0]) == oracle.tokenize(texts[0])
        assert tokenizer.batch_decode(expected["input_ids"]) == oracle.batch_decode(expected["input_ids"])


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_tensors_have_the_same_type_and_shape(both: Any, oracle: Any, kind: str) -> None:
    for text in (TEXTS, TEXTS[0]):
        ours, theirs = both(text, padding=True, return_tensors=kind), oracle(text, padding=True, return_tensors=kind)
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype
            assert ours[key].tolist() == theirs[key].tolist()


def test_padding_what_was_encoded_before(both: Any, oracle: Any) -> None:
    rows = [oracle(text) for text in TEXTS]
    dicts = [dict(row) for row in rows]
    for options in (
        {},
        {"padding": "max_length", "max_length": 30},
        {"pad_to_multiple_of": 8, "padding_side": "right"},
    ):
        assert plain(both.pad(dicts, **options)) == plain(oracle.pad(dicts, **options))
        assert plain(both.pad(dicts[0], **options)) == plain(oracle.pad(dict(dicts[0]), **options))
    assert (
        both.pad(dicts, return_tensors="pt").input_ids.tolist()
        == oracle.pad(dicts, return_tensors="pt").input_ids.tolist()
    )


def test_names_of_special_tokens(both: Any, oracle: Any) -> None:
    assert both.special_tokens_map == oracle.special_tokens_map
    assert sorted(both.all_special_ids) == sorted(set(oracle.all_special_ids) | {106, 107})
    assert both.get_vocab() == oracle.get_vocab()
    assert len(both) == len(oracle)
    assert both.num_special_tokens_to_add(pair=True) == oracle.num_special_tokens_to_add(pair=True)
    ids = [2, 5, 600, 1, 0]
    mask = both.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert mask == oracle.get_special_tokens_mask(ids, already_has_special_tokens=True)


def test_chats_are_written_as_transformers_writes_them(both: Any, oracle: Any) -> None:
    chat = [
        {"role": "user", "content": " Hi \n"},
        {"role": "assistant", "content": "Hello, "},
        {"role": "user", "content": "?"},
    ]
    for count, prompt in itertools.product((1, 2, 3), (False, True)):
        part = chat[:count]
        options = {"add_generation_prompt": prompt}
        for tokenize in (False, True):
            ours = both.apply_chat_template(part, tokenize=tokenize, **options)
            theirs = oracle.apply_chat_template(part, tokenize=tokenize, **options)
            assert (plain(ours) if tokenize else ours) == (plain(theirs) if tokenize else theirs)
    options = {"continue_final_message": True, "tokenize": False}
    assert both.apply_chat_template(chat[:2], **options) == oracle.apply_chat_template(chat[:2], **options)
    options = {"padding": True, "return_tensors": "pt"}
    ours = both.apply_chat_template([chat, chat[:1]], **options)
    theirs = oracle.apply_chat_template([chat, chat[:1]], **options)
    assert all((ours[key] == theirs[key]).all() for key in theirs)


RELEASED = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)


def test_the_released_template_and_our_own_write_the_same(both: Any) -> None:
    chat = [
        {"role": "user", "content": " Hi \n"},
        {"role": "assistant", "content": "Hello, "},
        {"role": "user", "content": "?"},
    ]
    for start in ([], [{"role": "system", "content": " Be brief. "}]):
        ours = both.apply_chat_template(start + chat, add_generation_prompt=True, tokenize=False)
        released = both.apply_chat_template(
            start + chat, add_generation_prompt=True, tokenize=False, chat_template=RELEASED
        )
        assert ours == released


def test_what_a_tokenizer_is_made_of(both: Any, oracle: Any) -> None:
    """By the names under which transformers' libraries look it up, the folder's among them."""
    asked = ("padding_side", "truncation_side", "spaces_between_special_tokens", "clean_up_tokenization_spaces")
    made = both.init_kwargs
    assert {name: made[name] for name in asked} == {name: oracle.init_kwargs[name] for name in asked}
    assert made["name_or_path"] == both.name_or_path and "name_or_path" in oracle.init_kwargs
    assert made["add_bos_token"] is both.add_bos_token and made["chat_template"] == both.chat_template
