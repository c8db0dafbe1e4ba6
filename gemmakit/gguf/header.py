"""The header of a GGUF file, read with limits of its own before anything is allocated for it.

Layout, all little-endian: "GGUF", uint32 version, uint64 tensors, uint64 pairs; then each pair (key, uint32 type,
value) and each tensor (name, uint32 dimensions, uint64 each of them, innermost first, uint32 type, uint64 offset);
then, from the next multiple of general.alignment, the tensors' bytes. A string is a uint64 length and UTF-8.
Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

from gemmakit.errors import CheckpointError
from gemmakit.gguf.kinds import NUMBERS, Kind

MAGIC = b"GGUF"
HEADER_LIMIT_BYTES = 256 * 2**20
MAX_PAIRS = 65_536
MAX_TENSORS = 65_536
MAX_ITEMS = 4_000_000  # of one array
MAX_NAME_BYTES = 65_535
MAX_TEXT_BYTES = 16 * 2**20
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 65_536

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
        data, begin = self._data, 0
        for index, end in enumerate(self._spans[1:]):
            try:
                yield data[begin + 8 : end].decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(self._where, f"item {index}", error) from None
            begin = end


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header declares it: type, shape (outermost first, as torch has it), bytes [begin, end)."""

    kind: Kind
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header: metadata by key (numbers, bool, str, array or Texts), and tensors in the order of the file."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, or `default`; CheckpointError if it is of another type (an int serves as a float)."""
        value = self.metadata.get(key, default)
        if key not in self.metadata:
            return value
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits and not (kind is float and type(value) is int):
            raise CheckpointError(f"{self.path}: {key} is {show(value)}; it must be of type {kind.__name__}. {_AGAIN}")
        return value

    def require_gemma(self) -> None:
        """CheckpointError unless the file says that it holds a Gemma of the first generation."""
        kind = self.get("general.architecture", str, "")
        if kind != "gemma":
            raise CheckpointError(
                f"{self.path} holds the architecture {show(kind)}: gemmakit runs Gemma 1, 1.1 and CodeGemma ('gemma')."
            )


def is_gguf(path: Path) -> bool:
    """Whether the file begins as every GGUF does, whatever it is called."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


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
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
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

    # -- the whole --------------------------------------------------------------------------------------------------

    def header(self) -> GgufHeader:
        version = self._version()
        tensors, pairs = self.number("Q"), self.number("Q")
        self._limit("tensors", tensors, MAX_TENSORS)
        self._limit("metadata pairs", pairs, MAX_PAIRS)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.name("a metadata key", metadata)
            metadata[key] = self.value(key, self.number("I"))
        places: dict[str, tuple[Kind, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self.name("a tensor's name", places)
            places[name] = self.place(name)
        found = self.tensors(places, self._alignment(metadata))
        return GgufHeader(self.path, version, MappingProxyType(metadata), MappingProxyType(found))

    def _version(self) -> int:
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
        return version

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            self.fail(f"general.alignment is {show(value)}; it must be a power of 2 from 8 to {MAX_ALIGNMENT}")
        return value

    # -- parts ------------------------------------------------------------------------------------------------------

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
        size = struct.calcsize(f"<{letter}")
        return struct.unpack(f"<{letter}", self.take(size))[0]

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
        return self.array(key, inner, count)

    def array(self, key: str, kind: int, count: int) -> Any:
        if kind == TEXT:
            return self._texts(key, count)
        if kind == BOOL:
            return self._bools(key, self.take(count))
        if kind not in NUMERIC:
            self.fail(f"{show(key)} is an array of {'arrays' if kind == ARRAY else f'the unknown type {kind}'}")
        letter = NUMERIC[kind]
        return list(struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(f"<{letter}"))))

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

    # -- tensors ----------------------------------------------------------------------------------------------------

    def place(self, name: str) -> tuple[Kind, tuple[int, ...], int]:
        """Type, shape and offset of a tensor, each possible by itself."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.fail(f"tensor {show(name)} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        number, offset = self.number("I"), self.number("Q")
        kind = NUMBERS.get(number)
        if kind is None:
            self.fail(f"tensor {show(name)} has the unknown type {number}")
        if not all(shape) or prod(shape) >= 2**63:
            self.fail(f"tensor {show(name)} has the impossible shape {shape}")
        if shape[-1] % kind.block:
            self.fail(f"tensor {show(name)} has rows of {shape[-1]}, and {kind.name} needs a multiple of {kind.block}")
        return kind, shape, offset

    def tensors(self, places: Mapping[str, tuple[Kind, tuple[int, ...], int]], alignment: int) -> dict[str, GgufTensor]:
        """The tensors by the order of their bytes, which are in the file and nobody else's."""
        data = -(-self.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        at, before = data, ""
        for name, (kind, shape, offset) in sorted(places.items(), key=lambda item: item[1][2]):
            begin = data + offset
            end = begin + kind.size(prod(shape))
            if offset % alignment:
                self.fail(f"tensor {show(name)} begins at {offset}, which is no multiple of {alignment}")
            if end > self.size:
                self.fail(
                    f"tensor {show(name)} needs bytes {begin} to {end}, and the file ends at {self.size}: "
                    "it is truncated"
                )
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
        raise _not_utf8(where, what, error) from None


def _not_utf8(where: str, what: str, error: UnicodeDecodeError) -> CheckpointError:
    return CheckpointError(f"{where}: {what} is not UTF-8 ({error.reason} at byte {error.start}). {_AGAIN}")


def show(value: Any) -> str:
    """`value` for a message: one short line of ASCII, whatever the file said."""
    text = ascii(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    return text if len(text) <= 120 else text[:120] + "..."
