"""GGUF files without their numbers: the header, read with limits of its own.

Layout, all little-endian: "GGUF", uint32 version, uint64 tensors, uint64 pairs; then each pair (key, uint32 type,
value) and each tensor (name, uint32 dimensions, uint64 each of them, innermost first, uint32 type, uint64 offset);
then, from the next multiple of general.alignment, the tensors' bytes. A string is a uint64 length and UTF-8.
Source: ggml's docs/gguf.md, ggml.h, and llama.cpp's gguf-py constants.

Data only, without torch and numpy: what it says of a model is `gemmakit.gguf_settings`', the tensors themselves are
`gemmakit.checkpoint.formats.gguf`'s.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, starmap
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, NoReturn

from gemmakit.errors import CheckpointError
from gemmakit.family import KINDS, Kind

# general.architecture -> model_type
ARCHITECTURES = {kind.gguf_architecture: name for name, kind in KINDS.items() if kind.gguf_architecture}


class BlockType(NamedTuple):
    """A tensor type: rows are whole blocks of `block` elements, `nbytes` bytes each."""

    number: int
    name: str
    block: int
    nbytes: int

    def size(self, elements: int) -> int:
        """Bytes of so many elements, a multiple of `block`."""
        return elements // self.block * self.nbytes


_TYPES = starmap(BlockType, (
    (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
))  # fmt: skip
TYPES = {kind.name: kind for kind in _TYPES}
_NUMBERS = {kind.number: kind for kind in TYPES.values()}
# name of the type -> name of the same in torch and numpy
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# -- the header --------------------------------------------------------------------------------------------------------

MAGIC = b"GGUF"
HEADER_LIMIT_BYTES = 256 * 2**20
MAX_PAIRS = MAX_TENSORS = MAX_ALIGNMENT = 65_536
MAX_ITEMS = 4_000_000  # of one array
MAX_NAME_BYTES, MAX_TEXT_BYTES, MAX_DIMENSIONS = 65_535, 16 * 2**20, 4

# value type -> struct letter
NUMERIC = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
BOOL, TEXT, ARRAY = 7, 8, 9
_LENGTH = struct.Struct("<Q").unpack_from
_FIRST_READ_BYTES = 64 * 1024
_AGAIN = "Download or convert it again."


class Texts:
    """An array of strings that are decoded when asked for: a vocabulary of 256,000 need not be, to know its size."""

    def __init__(self, where: str, data: bytes, spans: array[int]):
        self._where, self._data, self._spans = where, data, spans

    def __len__(self) -> int:
        return len(self._spans) - 1

    def __iter__(self) -> Iterator[str]:
        for index, (begin, end) in enumerate(pairwise(self._spans)):
            yield decode(self._where, self._data[begin + 8 : end], f"item {index}")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header declares it: type, shape (outermost first, as torch has it), bytes [begin, end)."""

    kind: BlockType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header: metadata by key (numbers, bool, str, array or Texts), and tensors in the order of the file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, or `default`; CheckpointError if it is of another type (an int serves as a float)."""
        value = self.metadata.get(key)
        if value is None:
            return default
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits and not (kind is float and type(value) is int):
            raise CheckpointError(f"{self.path}: {key} is {show(value)}; it must be of type {kind.__name__}. {_AGAIN}")
        return value

    def require_gemma(self) -> str:
        """The model_type of the Gemma that the file holds whole. Raises CheckpointError for anything else."""
        parts, part = self.get("split.count", int, 1), self.get("split.no", int, 0)
        if parts > 1:
            raise CheckpointError(
                f"{self.path} is part {part + 1} of {parts} of a model: merge them with llama.cpp's gguf-split "
                "(llama-gguf-split --merge FIRST-PART WHOLE.gguf)."
            )
        architecture = self.get("general.architecture", str, "")
        if architecture not in ARCHITECTURES:
            known = ", ".join(f"{KINDS[member].title} ({name!r})" for name, member in ARCHITECTURES.items())
            raise CheckpointError(f"{self.path} holds the architecture {show(architecture)}: gemmakit runs {known}.")
        experts = self.get(f"{architecture}.expert_count", int, 0)
        if experts:
            raise CheckpointError(
                f"{self.path} holds a mixture of {experts} experts, which gemmakit reads from safetensors alone: take "
                "those, or a dense model's file."
            )
        return ARCHITECTURES[architecture]

    @property
    def kind(self) -> Kind:
        """What this member is made of."""
        return KINDS[self.require_gemma()]

    @property
    def prefix(self) -> str:
        """What the keys about the model begin with."""
        return f"{self.kind.gguf_architecture}."


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Read and check the header; no tensor is read.

    Raises CheckpointError, naming the file, the values and the limit: no GGUF, another version or byte order,
    truncated, counts, strings or arrays over their limits, nested arrays, repeated names, unknown types, impossible
    shapes, and tensors that overlap or reach beyond the end of the file.
    """
    path = Path(path)
    try:
        status = path.stat()
        return _read(path, status.st_size, status.st_mtime_ns)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


@lru_cache(maxsize=1)  # configuration, weights and tokenizer of one model each ask for it
def _read(path: Path, size: int, _modified: int) -> GgufHeader:
    with path.open("rb") as file:
        return _Reader(path, file, size).header()


class _Reader:
    """The position in a header; reads no more of the file than what is declared so far, and never past the limit."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size
        self.data, self.at = b"", 0

    def fail(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is no usable GGUF file: {why}. {_AGAIN}")

    def header(self) -> GgufHeader:
        self._check_version()
        tensors, pairs = self.numbers("Q", 2)
        self._limit("tensors", tensors, MAX_TENSORS)
        self._limit("metadata pairs", pairs, MAX_PAIRS)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.name("a metadata key", metadata)
            metadata[key] = self.value(key, self.number("I"))
        places: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self.name("a tensor's name", places)
            places[name] = self.place(name)
        found = self.tensors(places, self._alignment(metadata))
        return GgufHeader(self.path, MappingProxyType(metadata), MappingProxyType(found))

    def _check_version(self) -> None:
        if self.size < 24:
            self.fail(f"it has {self.size} bytes, and a header alone has 24")
        magic = self.take(4)
        if magic != MAGIC:
            self.fail(f"it begins with {magic!r}, not with {MAGIC!r}")
        version = self.number("I")
        if version & 0xFFFF == 0:
            self.fail("its numbers are big-endian, and only little-endian files are read")
        if version not in (2, 3):
            self.fail(f"its version is {version}, and versions 2 and 3 are read")

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            self.fail(f"general.alignment is {show(value)}; it must be a power of 2 from 8 to {MAX_ALIGNMENT}")
        return value

    def take(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return self.data[self.at - count : self.at]

    def need(self, count: int) -> None:
        """Have `count` more bytes at hand, or say why there are none."""
        end = self.at + count
        if end > self.size:
            self.fail(f"its header goes on to byte {show(end)}, and the file ends at {self.size}: it is truncated")
        if end > HEADER_LIMIT_BYTES:
            self.fail(f"its header goes on to byte {end}; the limit is {HEADER_LIMIT_BYTES}")
        if end > len(self.data):
            wanted = min(self.size, max(end, 2 * len(self.data), _FIRST_READ_BYTES))
            self.data += self.file.read(wanted - len(self.data))
            if end > len(self.data):
                self.fail(f"{end} bytes of it are needed and {len(self.data)} were read: it is truncated")

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(f"<{letter}")))

    def text(self, what: str, limit: int) -> str:
        length = self.number("Q")
        self._limit(f"bytes in {what}", length, limit)
        return decode(str(self.path), self.take(length), what)

    def name(self, what: str, taken: Mapping[str, Any]) -> str:
        found = self.text(what, MAX_NAME_BYTES)
        if found in taken:
            self.fail(f"{what} occurs twice: {show(found)}")
        return found

    def value(self, key: str, kind: int) -> Any:
        if kind in NUMERIC:
            return self.number(NUMERIC[kind])
        if kind == BOOL:
            return self._bools(key, self.take(1))[0]
        if kind == TEXT:
            return self.text(show(key), MAX_TEXT_BYTES)
        if kind != ARRAY:
            self.fail(f"{show(key)} has the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        self._limit(f"items in {show(key)}", count, MAX_ITEMS)
        if inner == TEXT:
            return self._texts(key, count)
        if inner == BOOL:
            return self._bools(key, self.take(count))
        if inner not in NUMERIC:
            self.fail(f"{show(key)} is an array of {'arrays' if inner == ARRAY else f'the unknown type {inner}'}")
        return list(self.numbers(NUMERIC[inner], count))

    def _texts(self, key: str, count: int) -> Texts:
        begin = self.at
        spans = array("Q", [0])
        for _ in range(count):
            if self.at + 8 > len(self.data):
                self.need(8)
            (length,) = _LENGTH(self.data, self.at)
            if length > MAX_NAME_BYTES:
                self._limit(f"bytes in an item of {show(key)}", length, MAX_NAME_BYTES)
            self.at += 8 + length
            if self.at > len(self.data):
                self.need(0)
            spans.append(self.at - begin)
        return Texts(f"{self.path}: {show(key)}", self.data[begin : self.at], spans)

    def _bools(self, key: str, data: bytes) -> list[bool]:
        if data.strip(b"\0\1"):
            self.fail(f"{show(key)} is neither true nor false")
        return [byte == 1 for byte in data]

    def _limit(self, what: str, found: int, limit: int) -> None:
        if found > limit:
            self.fail(f"it declares {found} {what}; the limit is {limit}")

    def place(self, name: str) -> tuple[BlockType, tuple[int, ...], int]:
        """Type, shape and offset of a tensor, each possible by itself."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.fail(f"tensor {show(name)} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        shape = self.numbers("Q", dimensions)[::-1]
        number, offset = self.number("I"), self.number("Q")
        kind = _NUMBERS.get(number)
        if kind is None:
            self.fail(f"tensor {show(name)} has the unknown type {number}")
        if not all(shape) or prod(shape) >= 2**63:
            self.fail(f"tensor {show(name)} has the impossible shape {shape}")
        if shape[-1] % kind.block:
            self.fail(f"tensor {show(name)} has rows of {shape[-1]}, and {kind.name} needs a multiple of {kind.block}")
        return kind, shape, offset

    def tensors(
        self, places: Mapping[str, tuple[BlockType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GgufTensor]:
        """The tensors by the order of their bytes, which are in the file and nobody else's."""
        found: dict[str, GgufTensor] = {}
        at = data = -(-self.at // alignment) * alignment
        before = ""
        for name, (kind, shape, offset) in sorted(places.items(), key=lambda item: item[1][2]):
            begin = data + offset
            end = begin + kind.size(prod(shape))
            if offset % alignment:
                self.fail(f"tensor {show(name)} begins at {offset}, which is no multiple of {alignment}")
            if end > self.size:
                why = f"and the file ends at {self.size}: it is truncated"
                self.fail(f"tensor {show(name)} needs bytes {begin} to {end}, {why}")
            if begin < at:
                self.fail(f"tensors {show(before)} and {show(name)} overlap at byte {begin}")
            found[name] = GgufTensor(kind, shape, begin, end)
            at, before = end, name
        return found


def decode(where: str, data: bytes, what: str) -> str:
    """UTF-8 text; CheckpointError, naming it, if it is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"is not UTF-8 ({error.reason} at byte {error.start})"
        raise CheckpointError(f"{where}: {what} {why}. {_AGAIN}") from None


def show(value: Any) -> str:
    """`value` for a message: one short line of ASCII, whatever the file said."""
    text = ascii(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    return text if len(text) <= 120 else text[:120] + "..."
