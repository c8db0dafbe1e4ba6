"""`tokenizer.json`: read, bounded and validated, into the parts that a Gemma tokenizer is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemmakit.errors import TokenizerError
from gemmakit.text.model_file import MAX_FILE_BYTES, MAX_PIECE_BYTES, MAX_PIECES
from gemmakit.text.vocabulary import SPACE, AddedToken

_DECODERS = ("Replace", "ByteFallback", "Fuse")


@dataclass
class BpeFile:
    """A byte-pair vocabulary: pieces to ids, merges best first, and the tokens matched whole."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[int, AddedToken] = field(default_factory=dict)
    unk_token: str | None = "<unk>"
    byte_fallback: bool = True
    ignore_merges: bool = False

    @classmethod
    def read(cls, path: str | Path) -> BpeFile:
        """Read a file. Raises TokenizerError, naming the file, unless it holds a Gemma tokenizer."""
        path = Path(path)
        data = read_json(path)
        try:
            return cls.of(data)
        except TokenizerError as error:
            raise TokenizerError(f"{path} is not a usable tokenizer.json: {error}") from error

    @classmethod
    def of(cls, data: Any) -> BpeFile:
        model = _mapping(_mapping(data, "the file").get("model"), "model")
        if model.get("type", "BPE") != "BPE":
            raise TokenizerError(f"model.type is {model.get('type')!r}; Gemma's is 'BPE'.")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(name):
                raise TokenizerError(f"model.{name} is {model[name]!r}; Gemma has none.")
        _check_pipeline(data)
        vocab = vocab_of(model.get("vocab"))
        unknown = model.get("unk_token")
        if unknown is not None and (not isinstance(unknown, str) or unknown not in vocab):
            raise TokenizerError(f"model.unk_token {_clip(unknown)} is not in the vocabulary.")
        return cls(
            vocab=vocab,
            merges=merges_of(model.get("merges"), vocab),
            added=_added_of(data.get("added_tokens", []), vocab),
            unk_token=unknown,
            byte_fallback=_flag(model, "byte_fallback"),
            ignore_merges=_flag(model, "ignore_merges"),
        )


def read_json(path: Path) -> Any:
    """Any JSON file of at most MAX_FILE_BYTES. Raises TokenizerError, naming the file."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES} are read.")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}.") from error


def vocab_of(value: Any) -> dict[str, int]:
    """A validated copy: distinct small ids, pieces that are proper text."""
    table = _mapping(value, "vocab")
    if not 0 < len(table) <= MAX_PIECES:
        raise TokenizerError(f"the vocabulary has {len(table)} pieces; 1 to {MAX_PIECES} are allowed.")
    for piece, index in table.items():
        if type(index) is not int or not 0 <= index < MAX_PIECES:
            raise TokenizerError(f"piece {piece!r} has the id {index!r}; ids are 0 to {MAX_PIECES - 1}.")
        _check_piece(piece)
    if len(set(table.values())) != len(table):
        raise TokenizerError("two pieces of the vocabulary share an id.")
    return dict(table)


def merges_of(value: Any, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges as pairs; both parts and their join must be pieces."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TokenizerError(f"merges must be a list, found {type(value).__name__}.")
    pairs = []
    for index, merge in enumerate(value):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TokenizerError(f"merge {index} is {_clip(merge)}; a pair of pieces is needed.")
        left, right = pair
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(f"merge {index}, {_clip(merge)}, names a piece that the vocabulary does not have.")
        pairs.append((left, right))
    return pairs


def _added_of(value: Any, vocab: Mapping[str, int]) -> dict[int, AddedToken]:
    if not isinstance(value, list) or len(value) > MAX_PIECES:
        raise TokenizerError("added_tokens must be a list.")
    added: dict[int, AddedToken] = {}
    for entry in value:
        entry = _mapping(entry, "an added token")
        index, content = entry.get("id"), entry.get("content")
        if type(index) is not int or not 0 <= index < MAX_PIECES or index in added:
            raise TokenizerError(f"added token {_clip(content)} has the id {index!r}, which is taken or no id.")
        if not isinstance(content, str) or vocab.get(content, index) != index:
            raise TokenizerError(f"added token {_clip(content)} has the id {index}, but the vocabulary says otherwise.")
        _check_piece(content)
        added[index] = AddedToken.of(entry)
    return added


def _check_pipeline(data: Mapping[str, Any]) -> None:
    """Spaces become U+2581 on the way in and come back on the way out; nothing else is a Gemma tokenizer."""
    normalizer = data.get("normalizer")
    expected = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if normalizer != expected:
        raise TokenizerError(f"its normalizer is {_clip(normalizer)}; Gemma's is {expected}.")
    before = data.get("pre_tokenizer")
    if before is not None and (not isinstance(before, dict) or before.get("pattern") != {"String": " "}):
        raise TokenizerError(f"its pre_tokenizer is {_clip(before)}; Gemma's splits at plain spaces, or there is none.")
    decoder = data.get("decoder")
    steps = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and step.get("type") in _DECODERS for step in steps
    ):
        raise TokenizerError(f"its decoder is {_clip(decoder)}; Gemma's is Replace, ByteFallback and Fuse.")


def _check_piece(piece: str) -> None:
    if not piece or len(piece) > MAX_PIECE_BYTES:
        raise TokenizerError(f"piece {_clip(piece)} has {len(piece)} characters; 1 to {MAX_PIECE_BYTES} are allowed.")
    if not piece.isascii():
        try:
            piece.encode()
        except UnicodeEncodeError:
            raise TokenizerError(f"piece {_clip(piece)} holds a lone surrogate.") from None


def _flag(model: Mapping[str, Any], name: str) -> bool:
    value = model.get(name, False)
    if not isinstance(value, bool):
        raise TokenizerError(f"model.{name} is {_clip(value)}; true or false is needed.")
    return value


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TokenizerError(f"{what} must be an object, found {type(value).__name__}.")
    return value


def _clip(value: Any, limit: int = 120) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
