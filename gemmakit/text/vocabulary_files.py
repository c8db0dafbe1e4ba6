"""The files that a vocabulary comes in, bounded and validated: SentencePiece's `.model` and `tokenizer.json`.

A `.model` is a protocol buffer (sentencepiece_model.proto). Only what a Gemma vocabulary needs is interpreted: pieces
and a few switches of the trainer and normalizer. Everything else is kept as bytes and written back. The readers exist
because no native parser must ever see a file that could crash it: sizes, UTF-8, types and ids are checked here first.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemmakit.errors import TokenizerError
from gemmakit.text.vocabulary import SPACE, AddedToken

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_FILE_BYTES = 256 * 2**20
MAX_PIECES = 4_000_000
MAX_PIECE_BYTES = 4096

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_BPE = 2
# Identity, no dummy prefix, nothing trimmed, spaces as U+2581.
_PLAIN = b"\x0a\x08identity" + b"\x18\x00\x20\x00\x28\x01"
# Fields of TrainerSpec: model_type (2 is BPE), vocab_size, byte_fallback; ids and pieces by name.
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_SPECIAL_IDS, _SPECIAL_PIECES = (
    {"unk": 40, "bos": 41, "eos": 42, "pad": 43},
    {"unk": 45, "bos": 46, "eos": 47, "pad": 48},
)
_DECODERS = ("Replace", "ByteFallback", "Fuse")


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; `type` is one of NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE."""

    text: str
    score: float = 0.0
    type: int = NORMAL


@dataclass
class ModelFile:
    """The parts of a SentencePiece model that decide ids. `pieces[i]` has id i."""

    pieces: list[Piece]
    trainer_spec: bytes = b""
    normalizer_spec: bytes = b""
    rest: list[bytes] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> ModelFile:
        """Read and validate a file. Raises TokenizerError, naming the file, for anything that is not a BPE model."""
        path = Path(path)
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise TokenizerError(f"{path} has {size} bytes; a vocabulary may have at most {MAX_FILE_BYTES}.")
            data = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"cannot read the vocabulary {path}: {error.strerror or error}.") from error
        try:
            return cls.parse(data)
        except TokenizerError as error:
            raise TokenizerError(f"{path} is not a usable SentencePiece model: {error}") from error

    @classmethod
    def parse(cls, data: bytes) -> ModelFile:
        """Parse and validate the bytes of a model."""
        model = cls(pieces=[])
        for number, wire, value, raw in _fields(data):
            if number in (_PIECES, _TRAINER, _NORMALIZER) and not isinstance(value, bytes):
                raise TokenizerError(f"field {number} has wire type {wire}, expected {_BYTES}.")
            if number == _PIECES:
                if len(model.pieces) >= MAX_PIECES:
                    raise TokenizerError(f"more than {MAX_PIECES} pieces.")
                model.pieces.append(_parse_piece(value, len(model.pieces)))  # type: ignore[arg-type]
            elif number == _TRAINER:
                model.trainer_spec += value  # type: ignore[operator]
            elif number == _NORMALIZER:
                model.normalizer_spec += value  # type: ignore[operator]
            else:
                model.rest.append(raw)
        model.validate()
        return model

    @classmethod
    def of_pieces(cls, pieces: list[Piece], special: Mapping[str, int]) -> ModelFile:
        """The byte-pair model of these pieces that keeps text as it is. special: ids of unk, bos, eos and pad."""
        numbers = {_MODEL_TYPE: _BPE, _VOCAB_SIZE: len(pieces)}
        numbers[_BYTE_FALLBACK] = int(any(piece.type == BYTE for piece in pieces))
        texts: dict[int, str] = {}
        for name, index in special.items():
            if name in _SPECIAL_IDS and index < len(pieces):
                numbers[_SPECIAL_IDS[name]], texts[_SPECIAL_PIECES[name]] = index, pieces[index].text
        trainer = b"".join(_number_field(field, value) for field, value in numbers.items())
        trainer += b"".join(_length_delimited(field, text.encode()) for field, text in texts.items())
        return cls(pieces, trainer, _PLAIN)

    def validate(self) -> None:
        """Raise TokenizerError unless the pieces form a BPE vocabulary that both encoders can use."""
        if not self.pieces:
            raise TokenizerError("it holds no pieces.")
        seen: set[str] = set()
        for index, piece in enumerate(self.pieces):
            if piece.text in seen:
                raise TokenizerError(f"piece {index} ({piece.text!r}) appears twice.")
            seen.add(piece.text)
        unknown = sum(piece.type == UNKNOWN for piece in self.pieces)
        if unknown != 1:
            raise TokenizerError(f"it has {unknown} unknown pieces; exactly one is needed.")
        if any(piece.type == UNUSED for piece in self.pieces):
            raise TokenizerError("it has pieces marked as unused, which only SentencePiece itself can encode around.")
        self._validate_bytes()
        if self.trainer.get(_MODEL_TYPE, 1) != _BPE:
            raise TokenizerError(f"its model type is {self.trainer.get(_MODEL_TYPE, 1)}; Gemma's is {_BPE} (BPE).")
        normalizer = self.normalizer
        if normalizer.get(2):
            raise TokenizerError("its normalizer rewrites characters; Gemma's is the identity.")
        if any(number == _DENORMALIZER and value for raw in self.rest for number, _, value, _ in _fields(raw)):
            raise TokenizerError("it has a denormalizer; Gemma's vocabulary has none.")

    def _validate_bytes(self) -> None:
        found = [piece.text for piece in self.pieces if piece.type == BYTE]
        if found and sorted(found) != [f"<0x{value:02X}>" for value in range(256)]:
            raise TokenizerError(f"it has {len(found)} byte pieces; either none or <0x00> to <0xFF> are needed.")
        if bool(self.trainer.get(_BYTE_FALLBACK, 0)) != bool(found):
            raise TokenizerError("its byte_fallback setting and its byte pieces contradict each other.")

    @property
    def trainer(self) -> dict[int, int | bytes]:
        """Trainer settings by field number (3 model_type, 35 byte_fallback, 40..43 special ids)."""
        return {number: value for number, _, value, _ in _fields(self.trainer_spec)}

    @property
    def normalizer(self) -> dict[int, int | bytes]:
        """Normalizer settings by field number (3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape spaces)."""
        return {number: value for number, _, value, _ in _fields(self.normalizer_spec)}

    @property
    def byte_fallback(self) -> bool:
        return any(piece.type == BYTE for piece in self.pieces)

    @property
    def is_plain(self) -> bool:
        """True where spaces are kept as they are: no dummy prefix, nothing trimmed, space written as U+2581."""
        settings = self.normalizer
        return not settings.get(3, 1) and not settings.get(4, 1) and bool(settings.get(5, 1))

    def to_bytes(self) -> bytes:
        """The file's bytes, pieces first, as SentencePiece writes them."""
        parts = [_length_delimited(_PIECES, _dump_piece(piece)) for piece in self.pieces]
        for number, spec in ((_TRAINER, self.trainer_spec), (_NORMALIZER, self.normalizer_spec)):
            if spec:
                parts.append(_length_delimited(number, spec))
        return b"".join(parts + self.rest)

    def vocab(self) -> dict[str, int]:
        """Ids by piece."""
        return {piece.text: index for index, piece in enumerate(self.pieces)}

    def merges(self) -> list[tuple[str, str]]:
        """Every (left, right) whose join is a learned piece, best score first.

        SentencePiece stores no merges: it joins whichever neighbours form the best-scored piece. Listing every split of
        every piece, in the order of the scores, makes a merge table act the same. Splitting a piece costs its length,
        so 256,000 pieces take about a second; trying every pair of pieces would take hours.
        """
        # Stable: pieces of equal score keep the order of their ids.
        learned = sorted((piece for piece in self.pieces if piece.type == NORMAL), key=lambda piece: -piece.score)
        parts = {piece.text for piece in learned}
        # A character joins even where it is no piece of its own.
        parts.update(character for piece in learned for character in piece.text)
        merges: list[tuple[str, str]] = []
        for piece in learned:
            text = piece.text
            for cut in range(1, len(text)):
                if text[:cut] in parts and text[cut:] in parts:
                    merges.append((text[:cut], text[cut:]))  # noqa: PERF401 (the comprehension slices twice more)
        return merges


def scores_of(merges: Iterable[Sequence[str]]) -> Callable[[str, int], float]:
    """Of a piece and its id, the score by which SentencePiece joins as a list of merges says, best first."""
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    return lambda text, index: -float(rank.get(text, len(rank) + index))


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes, bytes]]:
    """(field number, wire type, value, raw bytes) for each field of a message; refuses what overruns it."""
    position, end = 0, len(data)
    while position < end:
        start = position
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if not 0 < number < 2**29:
            raise TokenizerError(f"field number {number} at byte {start} is out of range.")
        value: int | bytes
        if wire == _VARINT:
            value, position = _varint(data, position)
        elif wire == _BYTES:
            length, position = _varint(data, position)
            if length > end - position:
                raise TokenizerError(
                    f"field {number} at byte {start} declares {length} bytes, {end - position} are left."
                )
            value, position = data[position : position + length], position + length
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
            if length > end - position:
                raise TokenizerError(f"the file ends inside field {number} at byte {start}.")
            value, position = data[position : position + length], position + length
        else:
            raise TokenizerError(f"field {number} at byte {start} has the unknown wire type {wire}.")
        yield number, wire, value, data[start:position]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise TokenizerError(f"the file ends inside a number at byte {position}.")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), position
        shift += 7
        if shift >= 70:
            raise TokenizerError(f"a number at byte {position} is longer than 10 bytes.")


def _parse_piece(data: bytes, index: int) -> Piece:
    text: str | None = None
    score, kind = 0.0, NORMAL
    for number, wire, value, _ in _fields(data):
        if number == 1 and wire == _BYTES:
            text = _piece_text(bytes(value), index)  # type: ignore[arg-type]
        elif number == 2 and wire == _FIXED32:
            (score,) = struct.unpack("<f", value)  # type: ignore[arg-type]
        elif number == 3 and wire == _VARINT:
            kind = int(value)  # type: ignore[arg-type]
        elif number in (1, 2, 3):
            raise TokenizerError(f"piece {index}: field {number} has the wrong wire type {wire}.")
    return check_piece(Piece(text or "", score, kind), index)


def check_piece(piece: Piece, index: int) -> Piece:
    """`piece` unchanged, or TokenizerError: no text, a score that is no number, an unknown type."""
    if not piece.text:
        raise TokenizerError(f"piece {index} is empty.")
    if not math.isfinite(piece.score):
        raise TokenizerError(f"piece {index} has the score {piece.score}.")
    if not NORMAL <= piece.type <= BYTE:
        raise TokenizerError(f"piece {index} has the unknown type {piece.type}.")
    return piece


def _piece_text(data: bytes, index: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"piece {index} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    return check_text_of(text, len(data), index)


def check_text_of(text: str, nbytes: int, index: int) -> str:
    """`text` unchanged, or TokenizerError: a piece that is too long, or that holds NUL."""
    if nbytes > MAX_PIECE_BYTES:
        raise TokenizerError(f"piece {index} has {nbytes} bytes; at most {MAX_PIECE_BYTES} are allowed.")
    if "\0" in text:
        raise TokenizerError(f"piece {index} ({text!r}) holds a NUL character.")
    return text


def _dump_piece(piece: Piece) -> bytes:
    data = _length_delimited(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score)
    return data if piece.type == NORMAL else data + b"\x18" + _dump_varint(piece.type)


def _number_field(number: int, value: int) -> bytes:
    return _dump_varint(number << 3 | _VARINT) + _dump_varint(value)


def _length_delimited(number: int, data: bytes) -> bytes:
    return _dump_varint(number << 3 | _BYTES) + _dump_varint(len(data)) + data


def _dump_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# -- tokenizer.json ----------------------------------------------------------------------------------------------------


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
    pairs: list[tuple[str, str]] = []
    for merge in value:  # half a million: nothing is done for each but what must be
        try:
            left, right = merge.split(" ") if type(merge) is str else merge
            known = type(merge) is not dict and left in vocab and right in vocab and left + right in vocab
        except (TypeError, ValueError):
            raise TokenizerError(f"merge {len(pairs)} is {_clip(merge)}; a pair of pieces is needed.") from None
        if not known:
            raise TokenizerError(f"merge {len(pairs)}, {_clip(merge)}, names a piece that the vocabulary lacks.")
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
