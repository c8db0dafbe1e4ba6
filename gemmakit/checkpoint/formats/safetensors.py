"""A safetensors file as named arrays; its header is read and written in plain Python.

Layout: 8 bytes little-endian header length N, N bytes of JSON (padded with spaces), then the tensors' bytes without
holes. The native parser only sees a file whose header passed here, so a damaged or hostile one gives an error that
names file, tensor and bytes. Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gemmakit.checkpoint.arrays import BITS, TensorInfo, as_bytes, numpy_dtype, to_jax
from gemmakit.checkpoint.formats.msgpack import pytorch_name
from gemmakit.errors import CheckpointError

HEADER_LIMIT_BYTES = 100_000_000
_ENTRY_LIMIT_CHARS = 4096
_DATA_ALIGNMENT_BYTES = 64
_SPACE = re.compile(r"[ \t\n\r]*")
_VALUE = json.JSONDecoder()

# code in the file -> name that torch and ml_dtypes use
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F4": "float4_e2m1fn_x2",
}
CODES = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name in the order of the file, and the free text metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def sniff(path: Path) -> bool:
    """By its name."""
    return path.name.endswith(".safetensors")


def open(path: Path) -> SafetensorsFile | FlaxSafetensorsFile:
    """The file; where a Flax model wrote it, in its names and with its kernels turned, as one of the PyTorch layout."""
    file = SafetensorsFile(path)
    return FlaxSafetensorsFile(file) if file.metadata.get("format") == "flax" else file


class SafetensorsFile:
    """One safetensors file: header checked on opening, bytes mapped on demand."""

    kind = "safetensors"

    def __init__(self, path: Path):
        header = scan(path)
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = header.tensors
        self.metadata: Mapping[str, str] = header.metadata
        self._handles: dict[str, Any] = {}

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        if framework == "pt":
            return self._handle(device).get_tensor(name)
        array = _map_array(self.path, name, self.tensors[name])
        return array if framework == "np" else to_jax(array)

    def columns(self, name: str, start: int, stop: int) -> Any:
        """Columns [start, stop) of a matrix as a torch.Tensor, read row by row: no page of others is mapped for them.

        Raises CheckpointError where the file has become shorter.
        """
        import torch

        info = self.tensors[name]
        (rows, width), bytes_each = info.shape, BITS[info.dtype] // 8
        tensor = torch.empty((rows, stop - start), dtype=getattr(torch, info.dtype))
        into, size = as_bytes(tensor), (stop - start) * bytes_each
        with self.path.open("rb") as file:
            for row in range(rows):
                file.seek(info.begin + (row * width + start) * bytes_each)
                if file.readinto(into[row * size : (row + 1) * size]) != size:  # pyright: ignore[reportArgumentType]
                    raise CheckpointError(f"{self.path} is truncated: tensor {_show(name)} has no row {row}. {_AGAIN}")
        return tensor

    def close(self) -> None:
        self._handles.clear()

    def _handle(self, device: Any) -> Any:
        key = str(device)
        if key not in self._handles:
            from safetensors import SafetensorError, safe_open

            try:
                self._handles[key] = safe_open(self.path, framework="pt", device=key)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.path} cannot be read: {error}. If it was not changed meanwhile, safetensors may be too "
                    "old for its dtypes: `pip install -U safetensors`."
                ) from error
        return self._handles[key]


class FlaxSafetensorsFile:
    """A safetensors file of a Flax model in the PyTorch layout: kernels are transposed views."""

    kind = "safetensors"

    def __init__(self, file: SafetensorsFile):
        self._file = file
        self.path = path = file.path
        self.metadata: Mapping[str, str] = {}
        self._places: dict[str, tuple[str, bool]] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        for name, info in self._file.tensors.items():
            new, transposed = pytorch_name(name.replace(".", "/"))
            transposed = transposed and len(info.shape) == 2
            if new in self._places:
                raise CheckpointError(f"{path}: {self._places[new][0]!r} and {name!r} are both {new!r} in PyTorch.")
            self._places[new] = name, transposed
            shape = info.shape[::-1] if transposed else info.shape
            self.tensors[new] = TensorInfo(info.dtype, shape, info.begin, info.end, mapped=not transposed)

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        stored, transposed = self._places[name]
        made = self._file.tensor(stored, framework, device)
        return made.T if transposed else made

    def close(self) -> None:
        self._file.close()


def _map_array(path: Path, name: str, info: TensorInfo) -> Any:
    import numpy as np

    dtype = numpy_dtype(name, info.dtype)
    if info.nbytes == 0:
        return np.empty(info.shape, dtype)
    flat = np.memmap(path, np.uint8, mode="c", offset=info.begin, shape=(info.nbytes,))
    return np.asarray(flat).view(dtype).reshape(info.shape)


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, name -> TensorInfo, in the order of their bytes.

    Reads the header only. Raises CheckpointError if the header is over 100 MB, is not well-formed, repeats a name, has
    an unknown dtype, or if the byte ranges do not match the shapes, overlap, leave a hole, or do not end with the file.
    """
    return scan(path).tensors


def scan(path: str | os.PathLike[str]) -> Header:
    """`read_header` and the metadata, in one reading."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            raw = file.read(length)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(raw) != length:
        raise CheckpointError(f"{path} is truncated: its header needs {length} bytes, {len(raw)} were read. {_AGAIN}")
    return _parse(path, raw, data_begin=8 + length, size=size)


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds `tensors`, name -> (dtype name, shape, bytes), in this order.

    Padded so that the data begins on a 64-byte boundary: mapped weights are then aligned for vector loads.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT_BYTES)
    if len(text) > HEADER_LIMIT_BYTES:
        raise CheckpointError(f"The names of {len(tensors)} tensors need a header of {len(text)} bytes, over 100 MB.")
    return len(text).to_bytes(8, "little") + text


_AGAIN = "Download or save it again."


def _header_length(path: Path, first: bytes, size: int) -> int:
    if len(first) < 8:
        raise CheckpointError(f"{path} is truncated: a safetensors file has at least 8 bytes, found {size}. {_AGAIN}")
    length = int.from_bytes(first, "little")
    if length > HEADER_LIMIT_BYTES:
        raise CheckpointError(
            f"{path} declares a header of {length} bytes; the limit is {HEADER_LIMIT_BYTES}. "
            "It is not a safetensors file, or it is damaged."
        )
    if 8 + length > size:
        raise CheckpointError(f"{path} is truncated: its header ends at byte {8 + length}, found {size}. {_AGAIN}")
    return length


def _parse(path: Path, raw: bytes, data_begin: int, size: int) -> Header:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    try:
        for name, value in _entries(raw.decode("utf-8")):
            if name in tensors or (name == "__metadata__" and metadata is not None):
                raise ValueError(f"the name {_show(name)} occurs twice")
            if name == "__metadata__":
                metadata = value
            else:
                tensors[name] = _tensor_info(name, value, data_begin)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeError):
            error = ValueError("it is not UTF-8 text")
        raise CheckpointError(f"{path} has a malformed header: {error}. {_AGAIN}") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_ranges(path, ordered, data_begin, size)
    return Header(ordered, metadata or {})


def _entries(text: str) -> Iterator[tuple[str, Any]]:
    """Each (name, value) of the outermost JSON object, decoded one at a time.

    `json.loads` on the whole would let 100 MB of nested brackets become gigabytes of Python lists.
    """
    if not text.startswith("{"):
        raise ValueError("it does not begin with '{'")
    at = _skip(text, 1)
    more = text[at : at + 1] != "}"
    at += not more
    while more:
        name, at = _string(text, at)
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        value, at = _metadata(text, at) if name == "__metadata__" else _small_object(text, at)
        yield name, value
        at = _skip(text, at)
        more = text[at : at + 1] == ","
        at = _skip(text, at + 1) if more else _expect(text, at, "}")
    if _skip(text, at) != len(text):
        raise ValueError(f"something follows its end at character {at}")


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _expect(text: str, at: int, char: str) -> int:
    if text[at : at + 1] != char:
        raise ValueError(f"{char!r} expected at character {at}")
    return at + 1


def _string(text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        raise ValueError(f"a name expected at character {at}")
    value, end = _VALUE.raw_decode(text, at)
    value.encode()  # a lone surrogate, which only an escape can spell, is no text
    return value, end


def _metadata(text: str, at: int) -> tuple[dict[str, str], int]:
    found: dict[str, str] = {}
    at = _skip(text, _expect(text, at, "{"))
    more = text[at : at + 1] != "}"
    at += not more
    while more:
        key, at = _string(text, at)
        if key in found:
            raise ValueError(f"the metadata key {_show(key)} occurs twice")
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        found[key], at = _string(text, at)
        at = _skip(text, at)
        more = text[at : at + 1] == ","
        at = _skip(text, at + 1) if more else _expect(text, at, "}")
    return found, at


def _small_object(text: str, at: int) -> tuple[Any, int]:
    end = text.find("}", at, at + _ENTRY_LIMIT_CHARS) + 1
    if not end or text[at] != "{":
        raise ValueError(f"a tensor's description expected at character {at}")
    return json.loads(text[at:end], object_pairs_hook=_no_repeats), end


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a tensor's description repeats a key")
    return found


def _tensor_info(name: str, value: dict[str, Any], data_begin: int) -> TensorInfo:
    if set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {_show(name)} needs dtype, shape and data_offsets, found {_show(sorted(value))}")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {_show(name)} has the unknown dtype {_show(code)}")
    if not _are_counts(shape):
        raise ValueError(f"tensor {_show(name)} has the impossible shape {_show(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {_show(name)} has the impossible data_offsets {_show(offsets)}")
    dtype = DTYPES[code]
    expected, found = prod(shape) * BITS[dtype], (offsets[1] - offsets[0]) * 8
    if expected != found:
        raise ValueError(
            f"tensor {_show(name)} of dtype {code} and shape {_show(shape)} needs {_show(-(-expected // 8))} bytes, "
            f"found {found // 8}"
        )
    return TensorInfo(dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _are_counts(value: Any) -> bool:
    """Whether `value` is a list of whole numbers that fit 64 bits; true and false are not numbers here."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_ranges(path: Path, ordered: dict[str, TensorInfo], data_begin: int, size: int) -> None:
    at = data_begin
    for name, info in ordered.items():
        if info.end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {_show(name)} needs bytes {info.begin} to {info.end}, "
                f"the file has {size}. {_AGAIN}"
            )
        if info.begin != at:
            wrong = "overlaps the tensor before it" if info.begin < at else "leaves a hole before it"
            raise CheckpointError(
                f"{path} is damaged: tensor {_show(name)} {wrong}: expected to begin at byte {at}, "
                f"found {info.begin}. {_AGAIN}"
            )
        at = info.end
    if at != size:
        raise CheckpointError(f"{path} is damaged: its tensors end at byte {at}, the file has {size} bytes. {_AGAIN}")


def _show(value: Any) -> str:
    """`value` for a message: one short line of ASCII, whatever the file said."""
    text = ascii(value) if not isinstance(value, int) or value < 2**64 else "over 2**64"
    return text if len(text) <= 120 else text[:120] + "..."
