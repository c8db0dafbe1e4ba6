"""The words of a GGUF: pieces with scores and types, special ids, chat template; in and out of its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gemmakit.errors import CheckpointError
from gemmakit.gguf.header import GgufHeader, Texts, show

_KEY = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# our name -> GGUF's
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "mask": "mask", "eot": "eot"}


class Entry(NamedTuple):
    """A piece; `type` as in SentencePiece: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of a tokenizer of SentencePiece's kind. `entries[i]` has id i.

    special: ids of bos, eos, pad, unk, mask and eot (the end of a turn), as far as there are any.
    templates: chat templates by name, the usual one as "default".
    """

    entries: list[Entry]
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = True
    add_eos: bool = False
    templates: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, header: GgufHeader) -> Vocabulary:
        """Raises CheckpointError: no tokenizer, one of another kind, lists of different lengths, ids out of range."""
        header.require_gemma()
        model = header.get(f"{_KEY}model", str, "")
        if model != "llama":
            raise CheckpointError(
                f"{header.path} has a tokenizer of the kind {show(model)}; Gemma's is 'llama', SentencePiece pieces "
                "with scores. Take the tokenizer from the model's own repository."
            )
        if header.get(f"{_KEY}add_space_prefix", bool, False):
            raise CheckpointError(f"{header.path}: {_KEY}add_space_prefix is true; Gemma's tokenizer adds no space.")
        entries = _entries(header)
        ids = {name: header.get(f"{_KEY}{key}_token_id", int) for name, key in _SPECIAL.items()}
        for name, index in ids.items():
            if index is not None and not 0 <= index < len(entries):
                raise CheckpointError(
                    f"{header.path}: {_KEY}{_SPECIAL[name]}_token_id is {index}; the vocabulary has {len(entries)} "
                    "tokens."
                )
        return cls(
            entries,
            {name: index for name, index in ids.items() if index is not None},
            header.get(f"{_KEY}add_bos_token", bool, True),
            header.get(f"{_KEY}add_eos_token", bool, False),
            _templates(header),
        )

    def metadata(self, size: int) -> dict[str, Any]:
        """The tokenizer.* keys of a model with `size` ids; ids without a piece get one that no text has."""
        spare = [Entry(f"[PAD{index}]", -1000.0, 5) for index in range(len(self.entries), size)]
        entries = [*self.entries, *spare]
        named = {name: text for name, text in self.templates.items() if name != "default"}
        return {
            f"{_KEY}model": "llama",
            f"{_KEY}pre": "default",
            f"{_KEY}tokens": [entry.text for entry in entries],
            f"{_KEY}scores": [float(entry.score) for entry in entries],
            f"{_KEY}token_type": [entry.type for entry in entries],
            **{f"{_KEY}{_SPECIAL[name]}_token_id": index for name, index in self.special.items()},
            f"{_KEY}add_bos_token": self.add_bos,
            f"{_KEY}add_eos_token": self.add_eos,
            f"{_KEY}add_space_prefix": False,
            **({_TEMPLATE: self.templates["default"]} if "default" in self.templates else {}),
            **({"tokenizer.chat_templates": list(named)} if named else {}),
            **{f"{_TEMPLATE}.{name}": text for name, text in named.items()},
        }


def _entries(header: GgufHeader) -> list[Entry]:
    texts = header.metadata.get(f"{_KEY}tokens")
    if not isinstance(texts, Texts):
        raise CheckpointError(f"{header.path} has no list {_KEY}tokens, so it holds no tokenizer.")
    scores = _numbers(header, "scores", len(texts), float)
    types = _numbers(header, "token_type", len(texts), int)
    return list(map(Entry, texts, scores, types))


def _numbers(header: GgufHeader, key: str, count: int, kind: type) -> list[Any]:
    found = header.metadata.get(_KEY + key)
    if not isinstance(found, list) or len(found) != count or not all(type(item) is kind for item in found):
        has = f"{len(found)} items" if isinstance(found, list) else show(found)
        raise CheckpointError(
            f"{header.path}: {_KEY}{key} has {has}; {count} of type {kind.__name__} are needed, one for each token."
        )
    return found


def _templates(header: GgufHeader) -> dict[str, str]:
    named: Mapping[str, Any] = {
        key.removeprefix(f"{_TEMPLATE}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{_TEMPLATE}.") and isinstance(value, str)
    }
    usual = header.get(_TEMPLATE, str)
    return {**({} if usual is None else {"default": usual}), **named}
