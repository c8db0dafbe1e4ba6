"""The vocabulary of a tokenizer as a GGUF file holds it; gguf_reading.py is the way back.

GGUF holds the pieces of a SentencePiece model with their scores and types, which is all that decides ids. Two things
are spelled otherwise there: user-defined pieces have spaces where SentencePiece has U+2581, because llama.cpp looks for
them before it escapes spaces; and tokens that only programs should write are control pieces, which llama.cpp finds in
text only when asked to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from gemmakit.errors import TokenizerError
from gemmakit.gguf import Entry, Vocabulary
from gemmakit.text.gguf_reading import NAMED, model_of_pieces
from gemmakit.text.model_file import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, ModelFile, Piece
from gemmakit.text.rust import RustEngine
from gemmakit.text.sentencepiece import GemmaTokenizer, SentencePieceEngine
from gemmakit.text.tokenizer import TokenizerBase
from gemmakit.text.vocabulary import SPACE, TURN_TOKENS, AddedToken

_ADDED_SCORE = -1000.0  # of tokens that are not the vocabulary's own, as llama.cpp's converter has it


def vocabulary_of(source: str | os.PathLike[str] | TokenizerBase | ModelFile, **where: Any) -> Vocabulary:
    """The vocabulary to write into a GGUF file.

    source: a tokenizer, a SentencePiece model, or the folder, GGUF file or Hub id of a checkpoint; of a folder,
    tokenizer.model is preferred and tokenizer.json does. where: revision, token, ... as in `from_pretrained`.
    Raises TokenizerError for a vocabulary that GGUF cannot hold, and what loading raises.
    """
    if isinstance(source, ModelFile):
        source = GemmaTokenizer(source)
    tokenizer = source if isinstance(source, TokenizerBase) else GemmaTokenizer.from_pretrained(source, **where)
    engine = tokenizer._engine
    model = engine.model if isinstance(engine, SentencePieceEngine) else model_of_engine(engine)  # type: ignore[arg-type]
    pieces = [*model.pieces, *_beyond(engine.added, len(model.pieces))]
    template: Any = tokenizer.get_chat_template() if tokenizer.chat_template is None else tokenizer.chat_template
    templates = dict(template) if isinstance(template, Mapping) else {"default": template} if template else {}
    named = {name: getattr(tokenizer, f"{name}_token_id") for name in NAMED}
    turn = engine.token_to_id(TURN_TOKENS[1])
    return Vocabulary(
        [_entry(piece, engine.added.get(index)) for index, piece in enumerate(pieces)],
        {name: index for name, index in {**named, "eot": turn}.items() if index is not None},
        tokenizer.add_bos_token,
        tokenizer.add_eos_token,
        templates,
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


def model_of_engine(engine: RustEngine) -> ModelFile:
    """The SentencePiece model that gives a tokenizer.json's ids: scores from the order of its merges.

    Raises TokenizerError where ids have holes.
    """
    model = json.loads(engine.to_json())["model"]
    vocab: dict[str, int] = model["vocab"]
    texts: list[str | None] = [None] * len(vocab)
    for text, index in vocab.items():
        if index >= len(texts):
            raise TokenizerError(
                f"piece {text!r} has the id {index}, and there are {len(texts)} pieces: ids have holes."
            )
        texts[index] = text
    rank: dict[str, int] = {}
    for left, right in (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]):
        rank.setdefault(left + right, len(rank))
    fallback, unknown = bool(model.get("byte_fallback")), model.get("unk_token")
    pieces = []
    for index, text in enumerate(texts):
        assert text is not None
        byte = f"<0x{ord(text):02X}>" if fallback and len(text) == 1 and text.isascii() else ""
        if byte and byte not in vocab:  # the fast tokenizer's own spelling of a byte that merges join
            pieces.append(Piece(byte, 0.0, BYTE))
        else:
            kind = _kind(text, text == unknown, fallback, engine.added.get(index))
            pieces.append(Piece(text, -float(rank.get(text, len(rank) + index)) if kind == NORMAL else 0.0, kind))
    return model_of_pieces(pieces, {"unk": vocab[unknown]} if unknown in vocab else {})


def _kind(text: str, unknown: bool, fallback: bool, added: AddedToken | None) -> int:
    if unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.special else USER_DEFINED
    return BYTE if fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL
