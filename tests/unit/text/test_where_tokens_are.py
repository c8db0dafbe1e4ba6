"""Tokens, words and characters of an encoded text are found where transformers finds them."""

import pickle

import pytest
import transformers

from gemmakit.errors import InputError
from gemmakit.text import GemmaTokenizerFast

SAYINGS = ["Hello  world, 杰玛!", "a", "x\n\ny <start_of_turn> z"]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_tokens_words_and_characters_are_found_as_transformers_finds_them(saved, padding, pair):
    ours = GemmaTokenizerFast.from_pretrained(saved)
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    texts = (SAYINGS, SAYINGS[::-1]) if pair else (SAYINGS,)
    a = ours(*texts, padding=padding, return_offsets_mapping=True)
    b = theirs(*texts, padding=padding, padding_side="left", return_offsets_mapping=True)
    assert a.input_ids == b.input_ids
    assert (a.is_fast, a.n_sequences, len(a.encodings)) == (b.is_fast, 1 + pair, len(SAYINGS))
    for row, text in enumerate(SAYINGS):
        assert a.tokens(row) == b.tokens(row)
        assert a.sequence_ids(row) == b.sequence_ids(row)
        for token in range(len(a.input_ids[row])):
            assert a.token_to_sequence(row, token) == b.token_to_sequence(row, token)
            if a.sequence_ids(row)[token] is not None:
                assert tuple(a.token_to_chars(row, token)) == tuple(b.token_to_chars(row, token))
        for char in range(len(text)):
            assert a.char_to_token(row, char) == b.char_to_token(row, char)
    assert a.char_to_token(0, 999) is None


def test_words_are_found_as_transformers_finds_them(saved):
    ours = GemmaTokenizerFast.from_pretrained(saved)
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    asked = dict(is_split_into_words=True, return_offsets_mapping=True)
    a, b = (tokenizer([["Hello", "杰玛", "world"]], **asked) for tokenizer in (ours, theirs))
    assert a.word_ids(0) == b.word_ids(0)
    for word in range(3):
        assert tuple(a.word_to_tokens(0, word)) == tuple(b.word_to_tokens(0, word))
        assert tuple(a.word_to_chars(0, word)) == tuple(b.word_to_chars(0, word))
    for token in range(1, len(a.input_ids[0])):
        assert a.token_to_word(0, token) == b.token_to_word(0, token)


def test_what_a_tokenizer_gave_is_pickled_without_the_tokenizer(saved):
    encoded = GemmaTokenizerFast.from_pretrained(saved)(SAYINGS)
    twin = pickle.loads(pickle.dumps(encoded))
    assert twin == encoded
    assert twin.sequence_ids(0) == encoded.sequence_ids(0)
    assert len(pickle.dumps(encoded)) < 10_000
    asked = {"without its tokenizer": lambda: twin.tokens(), "offsets_mapping": lambda: encoded.char_to_token(0)}
    for said, call in asked.items():
        with pytest.raises(InputError, match=said):
            call()
