"""The vocabulary of a tokenizer as a GGUF file holds it, both ways.

GGUF holds the pieces of a SentencePiece model with their scores and types, which is all that decides ids; of Gemma 4
the merges instead of the scores, which say the same. Two things
are spelled otherwise there: user-defined pieces have spaces where SentencePiece has U+2581, because llama.cpp looks for
them before it escapes spaces; and tokens that only programs should write are control pieces, which llama.cpp finds in
text only when asked to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmakit.errors import CheckpointError, TokenizerError
from gemmakit.gguf import GgufHeader, Texts, read_gguf_header, show
from gemmakit.gguf_settings import MERGED, SPECIAL_IDS, TEMPLATE, WORDS, Entry, Vocabulary, special_ids
from gemmakit.text.vocabulary import SPACE, AddedToken
from gemmakit.text.vocabulary_files import (
    CONTROL,
    MAX_PIECE_BYTES,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ModelFile,
    Piece,
    check_piece,
    check_text_of,
    scores_of,
)

NAMED = ("bos", "eos", "pad", "unk", "mask")
_ADDED_SCORE = -1000.0  # of tokens that are not the vocabulary's own, as llama.cpp's converter has it


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
    if model not in ("llama", MERGED):
        raise CheckpointError(
            f"{header.path} has a tokenizer of the kind {show(model)}; Gemma's is 'llama', SentencePiece pieces "
            f"with scores, or {MERGED!r}, pieces and merges. Take the tokenizer from the model's own repository."
        )
    if header.get(f"{WORDS}add_space_prefix", bool, False):
        raise CheckpointError(f"{header.path}: {WORDS}add_space_prefix is true; Gemma's tokenizer adds no space.")
    entries = _entries(header, merged=model == MERGED)
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


def _entries(header: GgufHeader, merged: bool) -> list[Entry]:
    """Pieces with the scores of the file or, merged, with those that its list of merges means."""
    texts = header.metadata.get(f"{WORDS}tokens")
    if not isinstance(texts, Texts):
        raise CheckpointError(f"{header.path} has no list {WORDS}tokens, so it holds no tokenizer.")
    scores = [] if merged else _column(header, "scores", len(texts), float)
    types = _column(header, "token_type", len(texts), int)
    if not merged:
        return list(map(Entry, texts, scores, types))
    score = scores_of(_merges(header))
    pieces = enumerate(zip(texts, types, strict=True))
    return [Entry(text, score(text, i) if kind == NORMAL else 0.0, kind) for i, (text, kind) in pieces]


def _merges(header: GgufHeader) -> list[tuple[str, str]]:
    merges = header.metadata.get(f"{WORDS}merges")
    if not isinstance(merges, Texts):
        raise CheckpointError(f"{header.path} has no list {WORDS}merges, which says how pieces are joined.")
    pairs = [merge.partition(" ") for merge in merges]
    wrong = next((i for i, (left, _, right) in enumerate(pairs) if not left or not right), None)
    if wrong is not None:
        raise CheckpointError(f"{header.path}: item {wrong} of {WORDS}merges is no pair of pieces.")
    return [(left, right) for left, _, right in pairs]


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
    unknown = vocabulary.special.get("unk", len(entries))
    for entry in entries[unknown : unknown + 1]:
        if entry.type == CONTROL:  # as Gemma 3's files say of every special token
            entries[unknown] = entry._replace(type=UNKNOWN)
    pieces = [_piece(entry, index, index in control) for index, entry in enumerate(entries)]
    return ModelFile.of_pieces(pieces, vocabulary.special)


def _piece(entry: Entry, index: int, control: bool) -> Piece:
    text, score, kind = entry
    if len(text) > MAX_PIECE_BYTES // 4 or "\0" in text:
        check_text_of(text, len(text.encode()), index)
    if kind == CONTROL and not control:
        kind = USER_DEFINED  # as Google's own vocabulary has turns, <mask> and <unused0> to <unused98>
    if kind == USER_DEFINED:
        text = text.replace(" ", SPACE)
    return check_piece(Piece(text, score, kind), index)


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a tokenizer, to be written into a GGUF file.

    Raises TokenizerError for a vocabulary that GGUF cannot hold.
    """
    engine = tokenizer._engine
    model: ModelFile = engine.sentencepiece_model()
    pieces = [*model.pieces, *_beyond(engine.added, len(model.pieces))]
    template: Any = tokenizer.get_chat_template() if tokenizer.chat_template is None else tokenizer.chat_template
    templates = dict(template) if isinstance(template, Mapping) else {"default": template} if template else {}
    named = {name: getattr(tokenizer, f"{name}_token_id") for name in NAMED}
    return Vocabulary(
        [_entry(piece, engine.added.get(index)) for index, piece in enumerate(pieces)],
        {name: index for name, index in {**named, "eot": tokenizer.end_of_turn_id}.items() if index is not None},
        tokenizer.add_bos_token,
        tokenizer.add_eos_token,
        templates,
        model.merges(),
    )


def _beyond(added: Mapping[int, AddedToken], size: int) -> list[Piece]:
    """Tokens that were added behind the vocabulary."""
    extra = [added[index] for index in sorted(added) if index >= size]
    return [Piece(token.content, _ADDED_SCORE, CONTROL if token.special else USER_DEFINED) for token in extra]


def _entry(piece: Piece, added: AddedToken | None) -> Entry:
    text, kind = piece.text, piece.type
    if added is not None:
        if added.single_word or added.lstrip or added.rstrip:
            raise TokenizerError(
                f"added token {added.content!r} is matched as a single word or with the spaces beside it, which GGUF "
                "cannot say. Add it without single_word, lstrip and rstrip."
            )
        kind = CONTROL if added.special and kind in (NORMAL, USER_DEFINED) else kind
        kind = USER_DEFINED if kind == NORMAL else kind
    return Entry(text.replace(SPACE, " ") if kind == USER_DEFINED else text, piece.score, kind)
