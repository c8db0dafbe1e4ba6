"""Flax msgpack: a tree of arrays, as transformers' FlaxGemma wrote it and `flax.serialization` reads it.

The package msgpack reads and writes counts, names and shapes, a few bytes at a time; the arrays, which it would have
whole in memory, are left where they lie in the mapped file. So a damaged or hostile file takes no memory and gives an
error, and arrays are read one at a time. Written are the very bytes of `flax.serialization.msgpack_serialize`.
Sources: the msgpack specification; flax's serialization.py (extension 1 is an array: shape, dtype, bytes; arrays over
2**30 bytes are cut into flat chunks).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmakit.checkpoint.arrays import BITS, TensorInfo, numpy_dtype, to_jax
from gemmakit.errors import CheckpointError, MissingDependency

if TYPE_CHECKING:
    import msgpack

# last key of a path in the tree -> (its name in PyTorch, whether PyTorch stores it transposed)
PYTORCH: dict[str, tuple[str, bool]] = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "weight": ("weight", False),
    "bias": ("bias", False),
}
# how a module whose weight is no kernel ends -> what its weight is called in the tree
_OTHER_WEIGHTS = {
    "embed_tokens": "embedding",
    "embed_tokens_per_layer": "embedding",
    "norm": "weight",
    "layernorm": "weight",
}

CHUNK_BYTES = 2**30
_CHUNKED, _SHAPE, _CHUNKS = "__msgpack_chunked_array__", "shape", "chunks"
_NDARRAY = 1
_MAX_DEPTH, _MAX_ARRAYS, _MAX_NAME_BYTES, _MAX_AXES = 32, 200_000, 4096, 16
# What is given to msgpack at a time: more than any name or shape takes.
_WINDOW_BYTES = 8192
# The first byte of a map; and of bytes and of an extension, whose lengths then have one, two or four bytes.
_MAP = (*range(0x80, 0x90), 0xDE, 0xDF)
_BINARY, _EXTENSION = (0xC4, 0xC5, 0xC6), (0xC7, 0xC8, 0xC9)
# The first byte of an extension of one of five lengths.
_FIXED = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


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


def sniff(path: Path) -> bool:
    """By its name."""
    return path.name.endswith(".msgpack")


def open(path: Path) -> MsgpackFile:
    """Find the arrays of the tree. Raises CheckpointError."""
    return MsgpackFile(path)


class MsgpackFile:
    """One msgpack file as arrays in the PyTorch layout: kernels are transposed views of the mapped file."""

    kind = "msgpack"

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
            self.tensors[name] = TensorInfo(array.dtype, shape, begin, end, mapped=not transposed)

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
                    end = self._tree(0, "", 0)
                    if end != len(self.data):
                        raise ValueError(f"its tree ends at byte {end}, the file has {len(self.data)}")
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
        """Find the arrays in the map at `at`; where it ends."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"its tree is more than {_MAX_DEPTH} levels deep at byte {at}")
        count, at = self._small(at, "a tree of names", lambda reader: reader.read_map_header())
        for index in range(count):
            key, after = self._name(at)
            if index == 0 and count == 3 and key == _CHUNKED:
                return self._chunked(at, path)
            below = f"{path}/{key}" if path else key
            if self._byte(after) in _MAP:
                at = self._tree(after, below, depth + 1)
            else:
                array, at = self._array(after, below)
                self._add(below, array)
        return at

    def _add(self, path: str, array: _Array) -> None:
        if path in self.found:
            raise ValueError(f"the name {path!a} occurs twice")
        if len(self.found) >= _MAX_ARRAYS:
            raise ValueError(f"it has more than {_MAX_ARRAYS} arrays")
        self.found[path] = array

    def _chunked(self, at: int, path: str) -> int:
        """The three entries {marker: true, "shape": {"0": ..}, "chunks": {"0": array, ..}}, in any order."""
        shape: list[int] = []
        chunks: list[_Array] = []
        for _ in range(3):
            key, at = self._name(at)
            if key == _CHUNKS:
                count, at = self._small(at, "chunks", lambda reader: reader.read_map_header())
                parts: dict[str, _Array] = {}
                for _ in range(count):
                    number, at = self._name(at)
                    parts[number], at = self._array(at, path)
                chunks = _in_order(parts, count, path)
            elif key in (_CHUNKED, _SHAPE):
                value, at = self._small(at, "a shape", lambda reader: reader.unpack())
                if key == _SHAPE:
                    shape = _in_order(value, len(value) if isinstance(value, dict) else -1, path)
            else:
                raise ValueError(f"the array {path!a} in chunks has the unknown key {key!a}")
        _check_shape(shape, path)
        dtypes = {chunk.dtype for chunk in chunks}
        if len(dtypes) != 1 or sum(prod(chunk.shape) for chunk in chunks) != prod(shape):
            raise ValueError(f"the chunks of {path!a} do not make up its shape {shape}")
        self._add(path, _Array(dtypes.pop(), tuple(shape), tuple(r for chunk in chunks for r in chunk.ranges)))
        return at

    def _array(self, at: int, path: str) -> tuple[_Array, int]:
        """An extension of code 1: (shape, dtype name, bytes)."""
        at, end = self._extension(at, path)
        head = lambda reader: (reader.read_array_header(), reader.unpack(), reader.unpack())  # noqa: E731
        (count, shape, dtype), at = self._small(at, f"the shape of {path!a}", head)
        if count != 3:
            raise ValueError(f"the array {path!a} has {count} parts, not 3")
        _check_shape(shape, path)
        if not isinstance(dtype, str) or dtype not in BITS or BITS[dtype] % 8:
            raise ValueError(f"the array {path!a} has the unknown dtype {dtype!a:.100}")
        nbytes, at = self._length(at, _BINARY, f"the bytes of {path!a}")
        needed = prod(shape) * BITS[dtype] // 8
        if nbytes != needed or at + nbytes != end:
            raise ValueError(f"the array {path!a} of shape {shape} needs {needed} bytes, found {nbytes}")
        return _Array(dtype, tuple(shape), ((at, end),)), end

    # -- the pieces of the format --

    def _name(self, at: int) -> tuple[str, int]:
        what = f"a name of at most {_MAX_NAME_BYTES} bytes"
        name, after = self._small(at, what, lambda reader: reader.unpack())
        if not isinstance(name, str):
            raise ValueError(f"{what} expected at byte {at}")
        return name, after

    def _small(self, at: int, what: str, read: Callable[[msgpack.Unpacker], Any]) -> tuple[Any, int]:
        """What msgpack reads at `at`, which takes a few bytes, and where it ends."""
        msgpack = _package()
        reader = msgpack.Unpacker(max_buffer_size=_WINDOW_BYTES, max_str_len=_MAX_NAME_BYTES)
        reader.feed(self.data[at : at + _WINDOW_BYTES])
        try:
            return read(reader), at + reader.tell()
        except msgpack.OutOfData:
            raise ValueError(f"truncated: {what} at byte {at}, the file has {len(self.data)}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{what} at byte {at} is not UTF-8") from None
        except (ValueError, msgpack.UnpackException):
            raise ValueError(f"{what} expected at byte {at}") from None

    def _need(self, at: int, count: int) -> int:
        if at + count > len(self.data):
            raise ValueError(f"truncated: bytes {at} to {at + count} are needed, the file has {len(self.data)}")
        return at + count

    def _byte(self, at: int) -> int:
        self._need(at, 1)
        return self.data[at]

    def _length(self, at: int, codes: tuple[int, int, int], what: str) -> tuple[int, int]:
        first = self._byte(at)
        if first not in codes:
            raise ValueError(f"{what} expected at byte {at}")
        end = self._need(at + 1, 1 << codes.index(first))
        return int.from_bytes(self.data[at + 1 : end], "big"), end

    def _extension(self, at: int, path: str) -> tuple[int, int]:
        """Where an array's payload begins and ends."""
        first = self._byte(at)
        fixed = _FIXED.get(first)
        length, at = (fixed, at + 1) if fixed else self._length(at, _EXTENSION, f"in {path!a}, an array")
        if self._byte(at) != _NDARRAY:
            raise ValueError(f"{path!a} is an extension of code {self._byte(at)}, no array")
        return at + 1, self._need(at + 1, length)


def _in_order(numbered: Any, count: int, path: str) -> list[Any]:
    """{"0": a, "1": b, ...} in any order, as a list."""
    if not isinstance(numbered, dict) or set(numbered) != {str(i) for i in range(count)}:
        raise ValueError(f"the array {path!a} in chunks lacks some of them")
    return [numbered[str(i)] for i in range(count)]


def _check_shape(shape: Any, path: str) -> None:
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the array {path!a} has the impossible shape {shape!a:.100}")


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
    yield _package().Packer().pack_map_header(len(tree))
    for key in sorted(tree):
        yield _packed(key)
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
    shape = {str(i): number for i, number in enumerate(leaf.shape)}
    yield _package().Packer().pack_map_header(3) + _packed(_CHUNKED, True, _SHAPE, shape, _CHUNKS)
    yield _package().Packer().pack_map_header(len(edges) - 1)
    data = leaf.load()
    for i, (begin, end) in enumerate(pairwise(edges)):
        yield _packed(str(i)) + _array_head(leaf.dtype, ((end - begin) // wide,), end - begin)
        yield data[begin:end]


def _array_head(dtype: str, shape: tuple[int, ...], nbytes: int) -> bytes:
    """Everything of an array but its bytes."""
    inner = _package().Packer().pack_array_header(3) + _packed(shape, dtype) + _sized(_BINARY, nbytes)
    length = len(inner) + nbytes
    fixed = next((code for code, size in _FIXED.items() if size == length), None)
    return (bytes([fixed]) if fixed else _sized(_EXTENSION, length)) + bytes([_NDARRAY]) + inner


def _sized(codes: tuple[int, int, int], length: int) -> bytes:
    """A length in the fewest bytes that hold it, after the code that says how many."""
    width = next(width for width in (1, 2, 4) if length < 1 << 8 * width)
    return bytes([codes[width.bit_length() - 1]]) + length.to_bytes(width, "big")


def _packed(*values: Any) -> bytes:
    packer = _package().Packer()
    return b"".join(bytes(packer.pack(value)) for value in values)


def _package() -> Any:
    """The package msgpack, which only these files need."""
    try:
        import msgpack
    except ImportError as error:
        raise MissingDependency("Flax's .msgpack files need the package msgpack: `pip install msgpack`.") from error
    return msgpack
