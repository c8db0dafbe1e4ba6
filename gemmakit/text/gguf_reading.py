"""The tokenizer that a GGUF file holds: its pieces as a SentencePiece model; gguf.py says what is spelled otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmakit.errors import CheckpointError, TokenizerError
from gemmakit.gguf import (
    SPECIAL_IDS,
    TEMPLATE,
    WORDS,
    Entry,
    GgufHeader,
    Texts,
    Vocabulary,
    read_gguf_header,
    show,
    special_ids,
)
from gemmakit.text.model_file import (
    BYTE,
    CONTROL,
    MAX_PIECE_BYTES,
    UNUSED,
    USER_DEFINED,
    ModelFile,
    Piece,
    check_piece,
    check_text_of,
    number_field,
    text_field,
)
from gemmakit.text.vocabulary import SPACE

# Identity, no dummy prefix, nothing trimmed, spaces as U+2581.
_NORMALIZER = b"\x0a\x08identity" + b"\x18\x00\x20\x00\x28\x01"
# Fields of SentencePiece's TrainerSpec: model_type (2 is BPE), vocab_size, byte_fallback; ids and pieces by name.
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_IDS, _PIECES = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}, {"unk": 45, "bos": 46, "eos": 47, "pad": 48}
NAMED = ("bos", "eos", "pad", "unk", "mask")


def gguf_settings(path: Path) -> dict[str, Any]:
    """What makes a tokenizer of a GGUF file: constructor arguments, the SentencePiece model as `vocab_file`.

    Raises CheckpointError (a damaged header, no tokenizer) or TokenizerError (pieces that no Gemma tokenizer has).
    """
    vocabulary = read_vocabulary(read_gguf_header(path))
    try:
        model = model_of(vocabulary)
        model.validate()
    except TokenizerError as error:
        raise TokenizerError(f"{path} holds no usable vocabulary: {error}") from error
    pieces = model.pieces
    named = {name: vocabulary.special.get(name) for name in NAMED}
    if any(index is not None and index >= len(pieces) for index in named.values()):
        raise CheckpointError(f"{path}: a special token is among the unused ids at the end of the vocabulary.")
    templates = vocabulary.templates
    return {
        "vocab_file": model,
        **{f"{name}_token": None if index is None else pieces[index].text for name, index in named.items()},
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "chat_template": templates.get("default")
        if len(templates) < 2 and "default" in templates
        else templates or None,
    }


def read_vocabulary(header: GgufHeader) -> Vocabulary:
    """Raises CheckpointError: no tokenizer, one of another kind, lists of different lengths, ids out of range."""
    header.require_gemma()
    model = header.get(f"{WORDS}model", str, "")
    if model != "llama":
        raise CheckpointError(
            f"{header.path} has a tokenizer of the kind {show(model)}; Gemma's is 'llama', SentencePiece pieces "
            "with scores. Take the tokenizer from the model's own repository."
        )
    if header.get(f"{WORDS}add_space_prefix", bool, False):
        raise CheckpointError(f"{header.path}: {WORDS}add_space_prefix is true; Gemma's tokenizer adds no space.")
    entries = _entries(header)
    special = special_ids(header)
    for name, index in special.items():
        if not 0 <= index < len(entries):
            key = f"{WORDS}{SPECIAL_IDS[name]}_token_id"
            raise CheckpointError(f"{header.path}: {key} is {index}; the vocabulary has {len(entries)} tokens.")
    return Vocabulary(
        entries,
        special,
        header.get(f"{WORDS}add_bos_token", bool, True),
        header.get(f"{WORDS}add_eos_token", bool, False),
        _templates(header),
    )


def _entries(header: GgufHeader) -> list[Entry]:
    texts = header.metadata.get(f"{WORDS}tokens")
    if not isinstance(texts, Texts):
        raise CheckpointError(f"{header.path} has no list {WORDS}tokens, so it holds no tokenizer.")
    scores = _column(header, "scores", len(texts), float)
    types = _column(header, "token_type", len(texts), int)
    return list(map(Entry, texts, scores, types))


def _column(header: GgufHeader, key: str, count: int, kind: type) -> list[Any]:
    found = header.metadata.get(WORDS + key)
    if not isinstance(found, list) or len(found) != count or not all(type(item) is kind for item in found):
        has = f"{len(found)} items" if isinstance(found, list) else show(found)
        raise CheckpointError(
            f"{header.path}: {WORDS}{key} has {has}; {count} of type {kind.__name__} are needed, one for each token."
        )
    return found


def _templates(header: GgufHeader) -> dict[str, str]:
    named: Mapping[str, Any] = {
        key.removeprefix(f"{TEMPLATE}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{TEMPLATE}.") and isinstance(value, str)
    }
    usual = header.get(TEMPLATE, str)
    return {**({} if usual is None else {"default": usual}), **named}


def model_of(vocabulary: Vocabulary) -> ModelFile:
    """The SentencePiece model of these entries, without the unused ids that fill up the embedding at the end.

    Raises TokenizerError for a piece that no model may have.
    """
    entries = list(vocabulary.entries)
    while entries and entries[-1].type == UNUSED:
        entries.pop()
    control = {index for name, index in vocabulary.special.items() if name in ("bos", "eos", "pad", "unk")}
    pieces = [_piece(entry, index, index in control) for index, entry in enumerate(entries)]
    return model_of_pieces(pieces, vocabulary.special)


def _piece(entry: Entry, index: int, control: bool) -> Piece:
    text, score, kind = entry
    if len(text) > MAX_PIECE_BYTES // 4 or "\0" in text:
        check_text_of(text, len(text.encode()), index)
    if kind == CONTROL and not control:
        kind = USER_DEFINED  # as Google's own vocabulary has turns, <mask> and <unused0> to <unused98>
    if kind == USER_DEFINED:
        text = text.replace(" ", SPACE)
    return check_piece(Piece(text, score, kind), index)


def model_of_pieces(pieces: list[Piece], special: Mapping[str, int]) -> ModelFile:
    """The byte-pair SentencePiece model of these pieces; special: ids by name."""
    numbers = {_MODEL_TYPE: 2, _VOCAB_SIZE: len(pieces), _BYTE_FALLBACK: int(any(p.type == BYTE for p in pieces))}
    texts: dict[int, str] = {}
    for name, index in special.items():
        if name in _IDS and index < len(pieces):
            numbers[_IDS[name]], texts[_PIECES[name]] = index, pieces[index].text
    trainer = b"".join(number_field(field, value) for field, value in numbers.items())
    return ModelFile(pieces, trainer + b"".join(text_field(f, text) for f, text in texts.items()), _NORMALIZER)
