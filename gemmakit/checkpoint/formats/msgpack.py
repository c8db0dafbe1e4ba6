"""Flax msgpack: a tree of arrays, as transformers' FlaxGemma wrote it and `flax.serialization` reads it.

Read here without flax or msgpack: the bounded reader below walks the mapped file and notes where each array lies, so a
damaged or hostile file takes no memory and gives an error, and arrays are read one at a time. Written here too, byte
for byte what `flax.serialization.msgpack_serialize` gives. Sources: the msgpack specification; flax's serialization.py
(extension 1 is an array: shape, dtype, bytes; arrays over 2**30 bytes are cut into flat chunks).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from gemmakit.checkpoint.arrays import BITS, TensorInfo, numpy_dtype, to_jax
from gemmakit.errors import CheckpointError

# last key of a path in the tree -> (its name in PyTorch, whether PyTorch stores it transposed)
PYTORCH: dict[str, tuple[str, bool]] = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "weight": ("weight", False),
    "bias": ("bias", False),
}
# how a module whose weight is no kernel ends -> what its weight is called in the tree
_OTHER_WEIGHTS = {"embed_tokens": "embedding", "norm": "weight", "layernorm": "weight"}

CHUNK_BYTES = 2**30
_CHUNKED, _SHAPE, _CHUNKS = "__msgpack_chunked_array__", "shape", "chunks"
_NDARRAY = 1
_MAX_DEPTH, _MAX_ARRAYS, _MAX_NAME_BYTES, _MAX_AXES = 32, 200_000, 4096, 16


def pytorch_name(path: str) -> tuple[str, bool]:
    """The PyTorch name of a path like "model/layers/0/mlp/up_proj/kernel", and whether it is transposed there.

    A last key that no module here has is kept as it is, and so found to be left over.
    """
    *above, last = path.split("/")
    name, transposed = PYTORCH.get(last, (last, False))
    return ".".join((*above, name)), transposed


def flax_path(name: str) -> tuple[str, bool]:
    """The inverse: "model.layers.0.mlp.up_proj.weight" -> its path, and whether the tree has it transposed."""
    *above, last = name.split(".")
    if last == "weight":
        kind = next((key for end, key in _OTHER_WEIGHTS.items() if above and above[-1].endswith(end)), "kernel")
        return "/".join((*above, kind)), kind == "kernel"
    return "/".join((*above, last)), False


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Array:
    """Where an array of the tree lies: one range of bytes, or several that make it up when joined."""

    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]


class MsgpackFile:
    """One msgpack file as arrays in the PyTorch layout: kernels are transposed views of the mapped file."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._arrays: dict[str, tuple[_Array, bool]] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        for key, array in _Reader(path).arrays().items():
            name, transposed = pytorch_name(key)
            transposed = transposed and len(array.shape) == 2
            if name in self._arrays:
                raise CheckpointError(f"{path}: two arrays are called {name!r} in PyTorch, the second is {key!r}.")
            self._arrays[name] = array, transposed
            begin = array.ranges[0][0]
            end = begin + prod(array.shape) * BITS[array.dtype] // 8
            shape = array.shape[::-1] if transposed else array.shape
            self.tensors[name] = TensorInfo(array.dtype, shape, begin, end)

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        array, transposed = self._arrays[name]
        flat = self._bytes(array)
        if framework == "pt":
            import torch

            dtype = getattr(torch, array.dtype)
            tensor = torch.from_numpy(flat).view(dtype) if flat.size else torch.empty(0, dtype=dtype)
            tensor = tensor.reshape(array.shape).to(device)
            return tensor.t() if transposed else tensor
        made = flat.view(numpy_dtype(name, array.dtype)).reshape(array.shape)
        made = made.T if transposed else made
        return made if framework == "np" else to_jax(made)

    def close(self) -> None:
        """Nothing to let go of: every array holds its own mapping."""

    def pieces(self, name: str) -> list[Any] | None:
        """Flat torch views that make up a tensor which the file holds in chunks; None for one that is whole there."""
        import torch

        array, transposed = self._arrays[name]
        if len(array.ranges) == 1 or transposed:
            return None
        return [torch.from_numpy(self._view(*r)).view(getattr(torch, array.dtype)) for r in array.ranges]

    def _bytes(self, array: _Array) -> Any:
        """The array's bytes: a private view of the file, or a copy where it lies there in chunks."""
        import numpy as np

        if len(array.ranges) == 1:
            return self._view(*array.ranges[0])
        out = np.empty(sum(end - begin for begin, end in array.ranges), np.uint8)
        at = 0
        for begin, end in array.ranges:
            out[at : at + end - begin] = self._view(begin, end)
            at += end - begin
        return out

    def _view(self, begin: int, end: int) -> Any:
        import numpy as np

        if begin == end:
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(self.path, np.uint8, mode="c", offset=begin, shape=(end - begin,)))


class _Reader:
    """Walks a file's tree; nothing is believed before the file is known to hold it."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, _Array] = {}

    def arrays(self) -> dict[str, _Array]:
        """path of keys joined by "/" -> _Array. Raises CheckpointError."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) == 0:
                    raise ValueError("it is empty")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self.data:
                    self.size = len(self.data)
                    end = self._tree(0, "", 0)
            if end != self.size:
                raise ValueError(f"its tree ends at byte {end}, the file has {self.size}")
            if not self.found:
                raise ValueError("it holds no arrays")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        except ValueError as error:
            raise CheckpointError(
                f"{self.path} is no Flax msgpack checkpoint: {error}. Download or save it again."
            ) from error
        return self.found

    def _tree(self, at: int, path: str, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise ValueError(f"its tree is more than {_MAX_DEPTH} levels deep at byte {at}")
        count, at = self._map(at, path)
        if self._is_chunked(at, count):
            array, at = self._chunked(at, count, path)
            self._add(path, array)
            return at
        for _ in range(count):
            key, at = self._text(at)
            below = f"{path}/{key}" if path else key
            if self._kind(at) == "map":
                at = self._tree(at, below, depth + 1)
            else:
                array, at = self._array(at, below)
                self._add(below, array)
        return at

    def _add(self, path: str, array: _Array) -> None:
        if path in self.found:
            raise ValueError(f"the name {path!a} occurs twice")
        if len(self.found) >= _MAX_ARRAYS:
            raise ValueError(f"it has more than {_MAX_ARRAYS} arrays")
        self.found[path] = array

    # -- chunked arrays --

    def _is_chunked(self, at: int, count: int) -> bool:
        return count == 3 and self._kind(at) == "text" and self._text(at)[0] == _CHUNKED

    def _chunked(self, at: int, count: int, path: str) -> tuple[_Array, int]:
        """{marker: true, "shape": {"0": ..}, "chunks": {"0": array, ..}}"""
        shape: tuple[int, ...] = ()
        chunks: list[_Array] = []
        for _ in range(count):
            key, at = self._text(at)
            if key == _CHUNKED:
                at = self._need(at, 1)
            elif key == _SHAPE:
                shape, at = self._numbered(at, path, lambda i, _: self._number(i))
            elif key == _CHUNKS:
                chunks, at = self._numbered(at, path, self._array)
            else:
                raise ValueError(f"the array {path!a} in chunks has the unknown key {key!a}")
        dtypes = {chunk.dtype for chunk in chunks}
        if len(dtypes) != 1 or sum(prod(chunk.shape) for chunk in chunks) != prod(shape):
            raise ValueError(f"the chunks of {path!a} do not make up its shape {list(shape)}")
        return _Array(dtypes.pop(), tuple(shape), tuple(r for chunk in chunks for r in chunk.ranges)), at

    def _numbered(self, at: int, path: str, read: Any) -> tuple[Any, int]:
        """A map with the keys "0", "1", ..., in any order, as a list."""
        count, at = self._map(at, path)
        values: dict[str, Any] = {}
        for _ in range(count):
            key, at = self._text(at)
            values[key], at = read(at, path)
        if set(values) != {str(i) for i in range(count)}:
            raise ValueError(f"the array {path!a} in chunks lacks some of them")
        return [values[str(i)] for i in range(count)], at

    # -- one array --

    def _array(self, at: int, path: str) -> tuple[_Array, int]:
        """An extension of code 1: (shape, dtype name, bytes)."""
        length, at = self._extension(at, path)
        end = self._need(at, length)
        count, at = self._list(at, path)
        if count != 3:
            raise ValueError(f"the array {path!a} has {count} parts, not 3")
        axes, at = self._list(at, path)
        if axes > _MAX_AXES:
            raise ValueError(f"the array {path!a} has {axes} axes")
        shape: list[int] = []
        for _ in range(axes):
            number, at = self._number(at)
            shape.append(number)
        dtype, at = self._text(at)
        if dtype not in BITS or BITS[dtype] % 8:
            raise ValueError(f"the array {path!a} has the unknown dtype {dtype!a}")
        nbytes, at = self._binary(at, path)
        needed = prod(shape) * BITS[dtype] // 8
        if nbytes != needed or at + nbytes != end:
            raise ValueError(f"the array {path!a} of shape {shape} needs {needed} bytes, found {nbytes}")
        return _Array(dtype, tuple(shape), ((at, end),)), end

    # -- the pieces of the format --

    def _need(self, at: int, count: int) -> int:
        if at + count > self.size:
            raise ValueError(f"truncated: bytes {at} to {at + count} are needed, the file has {self.size}")
        return at + count

    def _byte(self, at: int) -> int:
        self._need(at, 1)
        return self.data[at]

    def _big(self, at: int, width: int) -> tuple[int, int]:
        end = self._need(at, width)
        return int.from_bytes(self.data[at:end], "big"), end

    def _kind(self, at: int) -> str:
        first = self._byte(at)
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            return "map"
        return "text" if 0xA0 <= first <= 0xBF or first in (0xD9, 0xDA, 0xDB) else "other"

    def _sized(self, at: int, path: str, what: str, fixed: tuple[int, int], wide: dict[int, int]) -> tuple[int, int]:
        """A length: in the first byte when it lies in `fixed`, else in as many bytes as `wide` says."""
        first = self._byte(at)
        low, high = fixed
        if low <= first <= high:
            return first - low, at + 1
        if first not in wide:
            raise ValueError(f"{what} expected at byte {at}" + (f", in {path!a}" if path else ""))
        return self._big(at + 1, wide[first])

    def _map(self, at: int, path: str) -> tuple[int, int]:
        return self._sized(at, path, "a tree of names", (0x80, 0x8F), {0xDE: 2, 0xDF: 4})

    def _list(self, at: int, path: str) -> tuple[int, int]:
        return self._sized(at, path, "a list", (0x90, 0x9F), {0xDC: 2, 0xDD: 4})

    def _binary(self, at: int, path: str) -> tuple[int, int]:
        return self._sized(at, path, "an array's bytes", (1, 0), {0xC4: 1, 0xC5: 2, 0xC6: 4})

    def _text(self, at: int) -> tuple[str, int]:
        length, at = self._sized(at, "", "a name", (0xA0, 0xBF), {0xD9: 1, 0xDA: 2, 0xDB: 4})
        if length > _MAX_NAME_BYTES:
            raise ValueError(f"the name at byte {at} has {length} bytes; at most {_MAX_NAME_BYTES} are allowed")
        end = self._need(at, length)
        try:
            return self.data[at:end].decode("utf-8"), end
        except UnicodeDecodeError:
            raise ValueError(f"the name at byte {at} is not UTF-8") from None

    def _number(self, at: int) -> tuple[int, int]:
        return self._sized(at, "", "a whole number", (0x00, 0x7F), {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})

    def _extension(self, at: int, path: str) -> tuple[int, int]:
        """The length of an array's payload and where it begins."""
        first = self._byte(at)
        fixed = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
        if first in fixed:
            length, at = fixed[first], at + 1
        else:
            length, at = self._sized(at, path, "an array", (1, 0), {0xC7: 1, 0xC8: 2, 0xC9: 4})
        if self._byte(at) != _NDARRAY:
            raise ValueError(f"{path!a} is an extension of code {self._byte(at)}, no array")
        return length, at + 1


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """An array to write: dtype name, shape as the tree has it, and how to get its bytes when its turn comes."""

    dtype: str
    shape: tuple[int, ...]
    load: Any

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        return prod(self.shape) * BITS[self.dtype] // 8


def encode(leaves: Mapping[str, Leaf]) -> Iterator[bytes | memoryview]:
    """The file's bytes in pieces, each array made when it comes. `load` gives a memoryview; names are sorted."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return _encode_tree(tree)


def _encode_tree(tree: dict[str, Any]) -> Iterator[bytes | memoryview]:
    yield _length(len(tree), 0x80, 15, ((0xDE, 2), (0xDF, 4)))
    for key in sorted(tree):
        yield _encode_text(key)
        value = tree[key]
        yield from _encode_leaf(value) if isinstance(value, Leaf) else _encode_tree(value)


def _encode_leaf(leaf: Leaf) -> Iterator[bytes | memoryview]:
    if leaf.nbytes <= CHUNK_BYTES:
        yield _array_head(leaf.dtype, leaf.shape, leaf.nbytes)
        yield leaf.load()
        return
    wide = BITS[leaf.dtype] // 8
    edges = [*range(0, leaf.nbytes, CHUNK_BYTES // wide * wide), leaf.nbytes]
    # In the order in which flax writes the keys of a chunked array.
    yield _length(3, 0x80, 15, ()) + _encode_text(_CHUNKED) + b"\xc3" + _encode_text(_SHAPE)
    yield _length(len(leaf.shape), 0x80, 15, ())
    for i, number in enumerate(leaf.shape):
        yield _encode_text(str(i)) + _encode_number(number)
    yield _encode_text(_CHUNKS) + _length(len(edges) - 1, 0x80, 15, ((0xDE, 2), (0xDF, 4)))
    data = leaf.load()
    for i, (begin, end) in enumerate(pairwise(edges)):
        yield _encode_text(str(i)) + _array_head(leaf.dtype, ((end - begin) // wide,), end - begin)
        yield data[begin:end]


def _array_head(dtype: str, shape: tuple[int, ...], nbytes: int) -> bytes:
    """Everything of an array but its bytes."""
    inner = b"\x93" + _length(len(shape), 0x90, 15, ()) + b"".join(map(_encode_number, shape)) + _encode_text(dtype)
    inner += _length(nbytes, 0, -1, ((0xC4, 1), (0xC5, 2), (0xC6, 4)))
    return _encode_extension(len(inner) + nbytes) + inner


def _encode_extension(length: int) -> bytes:
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
    head = bytes([fixed[length]]) if length in fixed else _length(length, 0, -1, ((0xC7, 1), (0xC8, 2), (0xC9, 4)))
    return head + bytes([_NDARRAY])


def _encode_text(text: str) -> bytes:
    data = text.encode()
    return _length(len(data), 0xA0, 31, ((0xD9, 1), (0xDA, 2), (0xDB, 4))) + data


def _encode_number(number: int) -> bytes:
    return _length(number, 0, 127, ((0xCC, 1), (0xCD, 2), (0xCE, 4), (0xCF, 8)))


def _length(value: int, first: int, most: int, wide: tuple[tuple[int, int], ...]) -> bytes:
    """A number in the first byte if it is at most `most`, else in the narrowest of the `wide` forms (code, bytes)."""
    if value <= most:
        return bytes([first + value])
    code, width = next((code, width) for code, width in wide if value < 1 << 8 * width)
    return struct.pack("B", code) + value.to_bytes(width, "big")
