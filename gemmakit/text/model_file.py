"""SentencePiece `.model` files: a bounded reader, a writer, and the merges that the pieces imply.

The file is a protocol buffer (sentencepiece_model.proto). Only what a Gemma vocabulary needs is interpreted: pieces and
a few switches of the trainer and normalizer. Everything else is kept as bytes and written back. The reader exists
because the native parser must never see a file that could crash it: sizes, UTF-8, types and ids are checked here first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gemmakit.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_FILE_BYTES = 256 * 2**20
MAX_PIECES = 4_000_000
MAX_PIECE_BYTES = 4096

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_BPE = 2


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
        if self.trainer.get(3, 1) != _BPE:
            raise TokenizerError(f"its model type is {self.trainer.get(3, 1)}; Gemma's is {_BPE} (BPE).")
        normalizer = self.normalizer
        if normalizer.get(2):
            raise TokenizerError("its normalizer rewrites characters; Gemma's is the identity.")
        if any(number == _DENORMALIZER and value for raw in self.rest for number, _, value, _ in _fields(raw)):
            raise TokenizerError("it has a denormalizer; Gemma's vocabulary has none.")

    def _validate_bytes(self) -> None:
        found = [piece.text for piece in self.pieces if piece.type == BYTE]
        if found and sorted(found) != [f"<0x{value:02X}>" for value in range(256)]:
            raise TokenizerError(f"it has {len(found)} byte pieces; either none or <0x00> to <0xFF> are needed.")
        if bool(self.trainer.get(35, 0)) != bool(found):
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


def number_field(number: int, value: int) -> bytes:
    """A field of a message that holds a whole number."""
    return _dump_varint(number << 3 | _VARINT) + _dump_varint(value)


def text_field(number: int, text: str) -> bytes:
    """A field of a message that holds text."""
    return _length_delimited(number, text.encode())


def _length_delimited(number: int, data: bytes) -> bytes:
    return _dump_varint(number << 3 | _BYTES) + _dump_varint(len(data)) + data


def _dump_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
