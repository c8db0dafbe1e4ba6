"""A tokenizer's tokens as bytes: what stop strings, grammars and healing compare.

This package takes ids and gives ids; a tokenizer comes in as an argument of generate() and is asked no more than the
names of its tokens. Gemma's names say U+2581 for a space and <0x..> for a byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_tables: WeakKeyDictionary[Any, tuple[Any, tuple[list[bytes], frozenset[int]]]] = WeakKeyDictionary()


class Tokenizer(Protocol):
    """The part of a tokenizer that generate() uses; GemmaTokenizer and GemmaTokenizerFast have it."""

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = ..., split_special_tokens: bool = ...) -> Any: ...


def bytes_of(name: str) -> bytes:
    """What the token of this name adds to a text."""
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("\u2581", " ").encode()


def token_table(tokenizer: Tokenizer, vocabulary: int) -> tuple[list[bytes], frozenset[int]]:
    """(bytes of each of V ids, the special ones among them); b"" for ids that the tokenizer does not have.

    Made once a tokenizer, and again when tokens were added to it.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    # Not the vocabulary itself: to copy 256,000 names takes longer than a step.
    key = (vocabulary, tuple(tokenizer.all_special_ids), tuple((i, t.content, t.special) for i, t in added.items()))
    kept = _tables.get(tokenizer)
    if kept is None or kept[0] != key:
        special = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        kept = _tables[tokenizer] = key, (_table(tokenizer, vocabulary), special)
    return kept[1]


def _table(tokenizer: Tokenizer, vocabulary: int) -> list[bytes]:
    table = [b""] * vocabulary
    for name, index in tokenizer.get_vocab().items():
        if index < vocabulary:
            table[index] = bytes_of(name)
    return table
