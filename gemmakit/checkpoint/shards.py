"""Named arrays of one format, written as one file, or as shards and an index, in the place of what is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gemmakit.checkpoint.index import encode_index
from gemmakit.checkpoint.publishing import Layout, publish, same_content, saving_into, shard_names
from gemmakit.files import require_disk

_CHUNK_BYTES = 16 * 2**20


class _Sized(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=_Sized)


def save_shards(
    directory: Path,
    layout: Layout,
    arrays: Mapping[str, S],
    encode: Callable[[Mapping[str, S]], Iterable[bytes | memoryview]],
    limit: int,
    files: Mapping[str, bytes],
) -> list[Path]:
    """Write `arrays` into `directory`, replacing the checkpoint there; the paths of the weight files, the index last.

    encode: the bytes of one file of some of the arrays, in pieces that are made one at a time. limit: bytes of arrays
    a file. files: name -> content of small files, switched right before the weights.

    At every instant a reader finds the previous checkpoint or the new one, whole. Raises CheckpointError.
    """
    shards = split(arrays, limit)
    with saving_into(directory) as staging:
        require_disk(directory, [*(array.nbytes for array in arrays.values()), *map(len, files.values())])
        names = [layout.single] if len(shards) == 1 else shard_names(directory, layout, len(shards))
        for name, shard in zip(names, shards, strict=True):
            write(staging / name, encode(shard))
        if len(shards) > 1:
            write(staging / layout.index, [_index(names, shards)])
            names.append(layout.index)
        changed = [name for name, data in files.items() if not same_content(directory / name, data)]
        for name in changed:
            write(staging / name, [files[name]])
        publish(staging, layout, names, changed)
    return [directory / name for name in names]


def split(arrays: Mapping[str, S], limit: int) -> list[dict[str, S]]:
    """Shards of at most `limit` bytes of arrays in the given order; a larger array gets a shard of its own."""
    shards: list[dict[str, S]] = [{}]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards


def _index(names: Sequence[str], shards: Sequence[Mapping[str, _Sized]]) -> bytes:
    held = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    arrays = [array for shard in shards for array in shard.values()]
    return encode_index(held, sum(array.nbytes for array in arrays), sum(prod(array.shape) for array in arrays))


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """A new file of these pieces, on the disk when this returns."""
    with path.open("xb", buffering=0) as file:
        for piece in pieces:
            write_all(file, piece)
            del piece  # an array, which must not be held while the next is made
        os.fsync(file.fileno())


def write_all(file: Any, piece: bytes | memoryview) -> None:
    """A raw write may take only a part: on a nearly full disk, or at a size limit."""
    data = memoryview(piece)
    while data:
        data = data[file.write(data[:_CHUNK_BYTES]) :]
