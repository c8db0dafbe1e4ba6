"""`GemmaTokenizerFast`: the Rust `tokenizers` library encodes, with ids equal to SentencePiece's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmakit.errors import InputError, TokenizerError
from gemmakit.text.tokenizer import TokenizerBase
from gemmakit.text.vocabulary import (
    SPACE,
    AddedToken,
    AddedTokens,
    Engine,
    Offsets,
    check_text,
    is_control,
    merge_added,
)
from gemmakit.text.vocabulary_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    BpeFile,
    ModelFile,
    Piece,
    merges_of,
    read_json,
    scores_of,
    vocab_of,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class RustEngine:
    """A `tokenizers.Tokenizer` made only from validated parts: no file's bytes reach the native parser."""

    def __init__(self, parts: BpeFile) -> None:
        self.tokenizer = _build(parts)
        self.added = AddedTokens()
        self._base_size = self.tokenizer.get_vocab_size(with_added_tokens=False)
        self.add(token for _, token in sorted(parts.added.items()))
        for index, token in parts.added.items():
            if self.tokenizer.token_to_id(token.content) != index:
                raise TokenizerError(
                    f"added token {token.content!r} has id {index}, but "
                    f"{self.tokenizer.token_to_id(token.content)} is its place after the vocabulary."
                )

    @classmethod
    def from_json_file(cls, path: str | Path) -> RustEngine:
        return cls(BpeFile.read(path))

    @classmethod
    def from_model(cls, model: ModelFile) -> RustEngine:
        """From a SentencePiece model: its pieces, the merges they imply, and its whole-matched symbols."""
        if not model.is_plain:
            raise TokenizerError("this SentencePiece model changes spaces; Gemma's keeps the text as it is.")
        unknown = next(piece.text for piece in model.pieces if piece.type == UNKNOWN)
        return cls(
            BpeFile(
                vocab=_with_joinable_bytes(model),
                merges=model.merges(),
                added=added_tokens_of(model),
                unk_token=unknown,
                byte_fallback=model.byte_fallback,
            )
        )

    @classmethod
    def from_vocab(cls, vocab: Any, merges: Any, names: Mapping[str, Any]) -> RustEngine:
        """From a dictionary of pieces and a list of merges (or their files); the named tokens are added as special."""
        unk_token = str(names["unk_token"])
        if vocab is None:
            order = ("pad_token", "eos_token", "bos_token", "unk_token", "mask_token")
            vocab = {str(names[name]): index for index, name in enumerate(order) if names.get(name) is not None}
        elif isinstance(vocab, (str, Path)):
            vocab = read_json(Path(vocab))
        table = vocab_of(vocab)
        if isinstance(merges, (str, Path)):
            lines = Path(merges).read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
        pairs = merges_of(merges or [], table)
        special = {str(token): AddedToken.of(token, special=True) for token in names.values() if token is not None}
        added = {table[text]: token for text, token in special.items() if text in table}
        fallback = all(f"<0x{value:02X}>" in table for value in range(256))
        return cls(BpeFile(table, pairs, added, unk_token, byte_fallback=fallback))

    @property
    def vocab_size(self) -> int:
        return self._base_size

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        return self.tokenizer.id_to_token(index) if 0 <= index < 2**32 else None

    def vocab(self) -> dict[str, int]:
        return self.tokenizer.get_vocab(with_added_tokens=True)

    def add(self, tokens: Iterable[AddedToken]) -> int:
        """Register tokens; those the vocabulary has keep their id. Returns how many ids are new."""
        from tokenizers import AddedToken as RustToken

        before = self.tokenizer.get_vocab_size()
        new: dict[str, int] = {}
        changed: dict[int, AddedToken] = {}
        for token in tokens:
            index = self.tokenizer.token_to_id(token.content)
            if index is None:
                index = new.setdefault(token.content, before + len(new))
            merged = merge_added(self.added, token, index)
            if self.added.get(index) != merged:
                self.added[index] = changed[index] = merged
        # One call for many: each call makes the search for all of them anew.
        for special, group in groupby(changed.values(), lambda token: token.special):
            register = self.tokenizer.add_special_tokens if special else self.tokenizer.add_tokens
            register([RustToken(**vars(token)) for token in group])
        return self.tokenizer.get_vocab_size() - before

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [check_text(text) for text in texts]
        if len(texts) == 1:
            return [self.tokenizer.encode(texts[0], add_special_tokens=False).ids]
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        texts = [check_text(text) for text in texts]
        found = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in found]

    def to_json(self) -> str:
        """The text of a `tokenizer.json` that the `tokenizers` library and transformers read."""
        return self.tokenizer.to_str(pretty=True)

    def set_around(self, before: Sequence[int], after: Sequence[int]) -> None:
        """The template that makes the Rust tokenizer alone put the same special tokens around a text."""
        from tokenizers import processors

        names = {index: self.id_to_token(index) for index in (*before, *after)}

        def sequence(slot: str, kind: int) -> list[str]:
            return [*(f"{names[i]}:{kind}" for i in before), f"${slot}:{kind}", *(f"{names[i]}:{kind}" for i in after)]

        self.tokenizer.post_processor = processors.TemplateProcessing(
            single=sequence("A", 0),
            pair=sequence("A", 0) + sequence("B", 1),
            special_tokens=[(name, index) for index, name in names.items()],
        )

    def model_bytes(self) -> bytes | None:
        return None

    def sentencepiece_model(self) -> ModelFile:
        """The SentencePiece model that gives the same ids: scores from the order of the merges.

        Raises TokenizerError where ids have holes.
        """
        model = json.loads(self.to_json())["model"]
        vocab: dict[str, int] = model["vocab"]
        texts: list[str | None] = [None] * len(vocab)
        for text, index in vocab.items():
            if index >= len(texts):
                raise TokenizerError(
                    f"piece {text!r} has the id {index}, and there are {len(texts)} pieces: ids have holes."
                )
            texts[index] = text
        score = scores_of(merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        fallback, unknown = bool(model.get("byte_fallback")), model.get("unk_token")
        pieces = []
        for index, text in enumerate(texts):
            assert text is not None
            byte = f"<0x{ord(text):02X}>" if fallback and len(text) == 1 and text.isascii() else ""
            if byte and byte not in vocab:  # the fast tokenizer's own spelling of a byte that merges join
                pieces.append(Piece(byte, 0.0, BYTE))
            else:
                kind = _kind(text, text == unknown, fallback, self.added.get(index))
                pieces.append(Piece(text, score(text, index) if kind == NORMAL else 0.0, kind))
        return ModelFile.of_pieces(pieces, {"unk": vocab[unknown]} if unknown in vocab else {})

    def tokenizer_json(self, before: Sequence[int], after: Sequence[int]) -> str:
        self.set_around(before, after)
        return self.to_json()


def added_tokens_of(model: ModelFile) -> AddedTokens:
    """The pieces of a `.model` that are matched whole: control pieces, the unknown piece, and user-defined symbols."""
    added = AddedTokens()
    for index, piece in enumerate(model.pieces):
        if piece.type in (CONTROL, UNKNOWN):
            added[index] = AddedToken(piece.text, normalized=False, special=True)
        elif piece.type == USER_DEFINED:
            added[index] = AddedToken(piece.text, normalized=SPACE in piece.text, special=is_control(piece.text))
    return added


def _with_joinable_bytes(model: ModelFile) -> dict[str, int]:
    """The vocabulary, with a byte piece renamed to its character where learned pieces hold that character.

    SentencePiece joins characters that are no pieces of their own (two tabs into one piece); a merge table cannot.
    Under the character's own name the byte keeps its id and can be joined.
    """
    vocab = model.vocab()
    learned = {character for piece in model.pieces if piece.type == NORMAL for character in piece.text}
    for character in sorted(learned - vocab.keys()):
        byte = f"<0x{ord(character):02X}>"
        if byte not in vocab or not character.isascii():
            raise TokenizerError(
                f"pieces hold {character!r}, which is no piece itself: merges cannot express it. Use GemmaTokenizer."
            )
        vocab[character] = vocab.pop(byte)
    return vocab


def _kind(text: str, unknown: bool, fallback: bool, added: AddedToken | None) -> int:
    if unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.special else USER_DEFINED
    return BYTE if fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _build(parts: BpeFile) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        tokenizer = Tokenizer(
            models.BPE(
                vocab=parts.vocab,
                merges=parts.merges,
                unk_token=parts.unk_token,
                fuse_unk=True,
                byte_fallback=parts.byte_fallback,
                ignore_merges=parts.ignore_merges,
            )
        )
    except Exception as error:
        raise TokenizerError(f"the vocabulary and its merges do not fit together: {error}") from error
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


class GemmaTokenizerFast(TokenizerBase):
    """Gemma's tokenizer on the Rust `tokenizers` library.

    Give a `tokenizer_file` (`tokenizer.json`) or a SentencePiece `vocab_file` (`.model`), whose merges are recovered,
    which takes no longer than reading them; with both, the `tokenizer_file` is read. With neither: a vocabulary of the
    five special tokens alone. The rest is described at `TokenizerBase`. Raises TokenizerError for malformed files.
    """

    is_fast = True

    def __init__(
        self,
        vocab_file: str | Path | ModelFile | None = None,
        tokenizer_file: str | Path | None = None,
        clean_up_tokenization_spaces: bool = False,
        unk_token: Any = "<unk>",
        bos_token: Any = "<bos>",
        eos_token: Any = "<eos>",
        pad_token: Any = "<pad>",
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        *,
        mask_token: Any = "<mask>",
        vocab: Mapping[str, int] | str | Path | None = None,
        merges: Sequence[Any] | str | Path | None = None,
        **settings: Any,
    ) -> None:
        self.vocab_file = str(vocab_file) if isinstance(vocab_file, (str, Path)) else None
        names = {"unk_token": unk_token, "bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        names["mask_token"] = mask_token
        if tokenizer_file is not None:
            engine: Engine = RustEngine.from_json_file(tokenizer_file)
        elif isinstance(vocab_file, ModelFile):
            engine = RustEngine.from_model(vocab_file)
        elif self.vocab_file is not None:
            engine = RustEngine.from_model(ModelFile.read(self.vocab_file))
        else:
            engine = RustEngine.from_vocab(vocab, merges, names)
        super().__init__(
            engine,
            **names,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **settings,
        )
        self.update_post_processor()

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The `tokenizers.Tokenizer`; its post-processor follows `add_bos_token` and `add_eos_token`."""
        assert isinstance(self._engine, RustEngine)
        return self._engine.tokenizer

    def train_new_from_iterator(self, *_: Any, **__: Any) -> None:
        """Refused: raises InputError, saying where training is shown."""
        raise InputError("training a vocabulary is not offered here; scripts/demo_vocabulary.py shows how it is done.")
