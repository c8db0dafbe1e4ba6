"""`GemmaTokenizer`: SentencePiece encodes, as Google's own code does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemmakit.errors import InputError, TokenizerError
from gemmakit.text.rust import RustEngine, added_tokens_of
from gemmakit.text.tokenizer import TokenizerBase
from gemmakit.text.vocabulary import (
    SPACE,
    AddedToken,
    Engine,
    Offsets,
    alternatives,
    check_text,
    merge_added,
)
from gemmakit.text.vocabulary_files import ModelFile

# The rest of SentencePiece's settings would change which ids come out (its own BOS, reversal) or their type.
_SP_SETTINGS = {"enable_sampling", "nbest_size", "alpha", "num_threads"}


class SentencePieceEngine:
    """SentencePiece, with the added tokens cut out of the text before it sees the rest."""

    def __init__(self, model: ModelFile, settings: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.settings = dict(settings or {})
        unknown = sorted(set(self.settings) - _SP_SETTINGS)
        if unknown:
            raise InputError(f"sp_model_kwargs holds {unknown}; known are {sorted(_SP_SETTINGS)}.")
        if not model.is_plain:
            raise TokenizerError(
                "this SentencePiece model adds a space in front, trims spaces or does not write them as U+2581; "
                "Gemma's keeps the text as it is. It belongs to another model family."
            )
        self.added = added_tokens_of(model)
        self._symbols = {token.content for token in self.added.values()}
        self._ids = model.vocab()
        self._names: dict[int, str] = {}
        self._user_added = False
        self._start()

    def _start(self) -> None:
        import sentencepiece

        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self.model.to_bytes(), **self.settings)
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            raise TokenizerError(f"SentencePiece refused the model: {error}") from error
        self._compile()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_sp"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def vocab_size(self) -> int:
        return len(self.model.pieces)

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, index: int) -> str | None:
        if 0 <= index < len(self.model.pieces):
            return self.model.pieces[index].text
        return self._names.get(index)

    def vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def add(self, tokens: Iterable[AddedToken]) -> int:
        """Register tokens; those the vocabulary has keep their id. Returns how many ids are new."""
        before, changed = len(self._ids), False
        for token in tokens:
            index = self._ids.setdefault(token.content, len(self._ids))
            if index >= self.vocab_size:
                self._names[index] = token.content
            self._user_added |= index not in self.added
            merged = merge_added(self.added, token, index)
            if self.added.get(index) != merged:
                self.added[index], changed = merged, True
        if changed:
            self._compile()
        return len(self._ids) - before

    def _compile(self) -> None:
        """Two passes, as the Rust tokenizer makes them: over raw text, then over text with spaces written as U+2581.

        SentencePiece matches its user-defined symbols itself; they are cut out here only when other tokens were
        added, so that the leftmost and longest of all of them wins.
        """
        raw = [token for index, token in self.added.items() if not token.normalized and self._cut(index, token)]
        spaced = [token for token in self.added.values() if token.normalized]
        self._raw = re.compile(alternatives(raw)) if raw else None
        own = any(token.content not in self._symbols for token in spaced)
        self._spaced = re.compile(alternatives(map(_with_spaces, spaced))) if own else None

    def _cut(self, index: int, token: AddedToken) -> bool:
        return token.special or self._user_added or index >= self.vocab_size

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode_one(check_text(text)) for text in texts]

    def _encode_one(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._parts(text):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids.extend(self._sp.encode(part))
        return ids

    def _parts(self, text: str) -> Iterator[str | int]:
        for part in _split(text, self._raw, self._ids):
            if isinstance(part, int) or self._spaced is None:
                yield part
            else:
                yield from _split(part.replace(" ", SPACE), self._spaced, self._ids)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        raise InputError(
            "return_offsets_mapping needs GemmaTokenizerFast: SentencePiece gives no offsets for byte pieces."
        )

    def set_around(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Nothing: SentencePiece has no post-processor."""

    def model_bytes(self) -> bytes | None:
        return self.model.to_bytes()

    def sentencepiece_model(self) -> ModelFile:
        return self.model

    def tokenizer_json(self, before: Sequence[int], after: Sequence[int]) -> str:
        rust = RustEngine.from_model(self.model)
        rust.add(token for _, token in sorted(self.added.items()))
        return rust.tokenizer_json(before, after)


def _with_spaces(token: AddedToken) -> AddedToken:
    return replace(token, content=token.content.replace(" ", SPACE))


def _split(text: str, pattern: re.Pattern[str] | None, ids: Mapping[str, int]) -> Iterator[str | int]:
    """Text between matches as strings, matches as ids."""
    position = 0
    for match in pattern.finditer(text) if pattern else ():
        yield text[position : match.start()]
        found = match.group()
        index = ids.get(found)
        # A token that swallows the spaces beside it, or that was registered with spaces, is found under its bare name.
        if index is None:
            index = ids.get(found.strip(), ids.get(found.replace(SPACE, " ")))
        yield index if index is not None else found
        position = match.end()
    yield text[position:]


class GemmaTokenizer(TokenizerBase):
    """Gemma's tokenizer. With a SentencePiece `vocab_file` it is SentencePiece that encodes; else the Rust backend.

    vocab_file: path of a `.model` file, or a ModelFile. tokenizer_file: path of a `tokenizer.json`. vocab, merges: a
    dictionary of pieces to ids and a list of (left, right) pairs (or "left right"), or paths of JSON and text files
    that hold them.
    With none of them: a vocabulary of the five special tokens alone.
    sp_model_kwargs: settings for SentencePiece: `enable_sampling`, `nbest_size`, `alpha`, `num_threads`.
    The rest is described at `TokenizerBase`. Raises TokenizerError for files that are missing or malformed.
    """

    def __init__(
        self,
        vocab_file: str | Path | ModelFile | None = None,
        unk_token: Any = "<unk>",
        bos_token: Any = "<bos>",
        eos_token: Any = "<eos>",
        pad_token: Any = "<pad>",
        sp_model_kwargs: Mapping[str, Any] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        use_default_system_prompt: bool = False,
        spaces_between_special_tokens: bool = False,
        *,
        mask_token: Any = "<mask>",
        vocab: Mapping[str, int] | str | Path | None = None,
        merges: Sequence[Any] | str | Path | None = None,
        tokenizer_file: str | Path | None = None,
        **settings: Any,
    ) -> None:
        model = vocab_file if isinstance(vocab_file, ModelFile) else None
        self.vocab_file = None if vocab_file is None or model is not None else str(vocab_file)
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        names = {"unk_token": unk_token, "bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        names["mask_token"] = mask_token
        super().__init__(
            self._engine_for(model, vocab, merges, tokenizer_file, names),
            **names,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            use_default_system_prompt=use_default_system_prompt,
            spaces_between_special_tokens=spaces_between_special_tokens,
            **settings,
        )

    def _engine_for(
        self, model: ModelFile | None, vocab: Any, merges: Any, tokenizer_file: Any, names: Mapping[str, Any]
    ) -> Engine:
        if self.vocab_file is not None:
            model = ModelFile.read(self.vocab_file)
        if model is not None:
            return SentencePieceEngine(model, self.sp_model_kwargs)
        if self.sp_model_kwargs:
            raise InputError("sp_model_kwargs needs vocab_file, the SentencePiece model it is meant for.")
        if tokenizer_file is not None:
            return RustEngine.from_json_file(tokenizer_file)
        return RustEngine.from_vocab(vocab, merges, names)

    @property
    def sp_model(self) -> Any:
        """The SentencePieceProcessor behind this tokenizer, or None where the Rust backend encodes."""
        return getattr(self._engine, "_sp", None)
