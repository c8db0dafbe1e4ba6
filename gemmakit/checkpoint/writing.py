"""Saving named tensors as safetensors, in one file or in shards, without ever leaving half a checkpoint."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gemmakit.checkpoint.header import BITS, encode_header
from gemmakit.checkpoint.index import encode_index
from gemmakit.checkpoint.publishing import (
    INDEX,
    SINGLE,
    encode_files,
    publish,
    same_content,
    saving_into,
    shard_names,
)
from gemmakit.errors import CheckpointError, InputError
from gemmakit.hub import Name, check_relative

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CHUNK_BYTES = 16 * 2**20
_SLACK_BYTES = 64 * 1024
_NO_FILES: Mapping[str, bytes | str] = MappingProxyType({})
_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written comes: dtype name ("bfloat16"), shape, and how to make it."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Any]


@dataclass(frozen=True)
class _Item:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    load: Callable[[], Any]


def parse_size(size: int | str) -> int:
    """A size in bytes: 5_000_000_000 or "5GB" (10**9), "200MB", "1GiB" (2**30). InputError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", size.upper()) if isinstance(size, str) else None
    bytes_ = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if bytes_ < 1:
        raise InputError(f"A size must be a positive number of bytes or like '5GB', '200MB', '1GiB'; found {size!r}.")
    return bytes_


def save_checkpoint(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    directory: Name,
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] = _METADATA,
    extra_files: Mapping[str, bytes | str] = _NO_FILES,
) -> list[Path]:
    """Write a checkpoint into `directory`, replacing the one there; the paths of its weight files, the index last.

    tensors: name -> torch.Tensor, numpy or jax array, `LazyTensor`, or a callable giving one of these (called twice:
    once for its size, once to write it). Tensors that share memory are written once each: leave out tied ones.
    One model.safetensors if everything fits `max_shard_size`, else shards in the given order and an index.
    extra_files: name -> content of small files that belong to it (config.json), switched right before the weights.

    At every instant a reader finds the previous checkpoint or the new one, whole, even after kill -9 or on a full disk;
    the tensors may be maps of the very files that are replaced. Needs room for both checkpoints at once.
    Raises CheckpointError (not enough disk, with needed and free bytes; a failed write) and InputError.
    """
    directory = Path(directory).expanduser()
    limit = parse_size(max_shard_size)
    items = _plan_items(tensors)
    shards = _split(items, limit)
    files = _check_files(extra_files)
    try:
        with saving_into(directory) as staging:
            _require_disk(directory, sum(item.nbytes for item in items) + sum(map(len, files.values())), items)
            names = [SINGLE] if len(shards) == 1 else shard_names(directory, len(shards))
            for name, shard in zip(names, shards, strict=True):
                _write_shard(staging / name, shard, metadata)
            if len(shards) > 1:
                _write(staging / INDEX, [_index(names, shards)])
                names = [*names, INDEX]
            changed = {name: data for name, data in files.items() if not same_content(directory / name, data)}
            for name, data in changed.items():
                _write(staging / name, [data])
            publish(staging, names, list(changed))
    except OSError as error:
        raise _explain(error, directory) from error
    return [directory / name for name in names]


def _plan_items(tensors: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> list[_Item]:
    items: dict[str, _Item] = {}
    for name, value in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if not isinstance(name, str) or name == "__metadata__" or name in items:
            raise InputError(f"Tensor names must be text, each once, and not '__metadata__'; found {name!r}.")
        items[name] = _item(name, value)
    return list(items.values())


def _item(name: str, value: Any) -> _Item:
    dtype, shape = _describe(value() if _is_maker(value) else value)
    if dtype not in BITS or BITS[dtype] % 8:
        raise InputError(f"Tensor {name!r} has dtype {dtype}, which cannot be saved. Use one of: {', '.join(BITS)}.")
    return _Item(name, dtype, shape, prod(shape) * BITS[dtype] // 8, lambda: _made(value))


def _describe(array: Any) -> tuple[str, tuple[int, ...]]:
    return str(array.dtype).removeprefix("torch."), tuple(int(n) for n in array.shape)


def _made(value: Any) -> Any:
    """The array behind a LazyTensor or a callable."""
    while isinstance(value, LazyTensor) or _is_maker(value):
        value = value.load() if isinstance(value, LazyTensor) else value()
    return value


def _is_maker(value: Any) -> bool:
    return callable(value) and not hasattr(value, "shape")


def _split(items: Sequence[_Item], limit: int) -> list[list[_Item]]:
    """Shards of at most `limit` bytes of tensors in the given order; a larger tensor gets a shard of its own."""
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _check_files(files: Mapping[str, bytes | str]) -> dict[str, bytes]:
    for name in files:
        check_relative(name)
        if "/" in name or name == INDEX or name.endswith(".safetensors"):
            raise InputError(f"Extra file {name!r} must have a plain name that no weight file has.")
    return encode_files(files)


def _require_disk(directory: Path, needed: int, items: Sequence[_Item]) -> None:
    needed += _SLACK_BYTES + 256 * len(items)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"Saving into {str(directory)!r} needs {needed} bytes, but the disk has {free} bytes free (the present "
            "checkpoint is kept until the new one is whole). Free some space or save elsewhere. Nothing was changed."
        )


def _write_shard(path: Path, items: Sequence[_Item], metadata: Mapping[str, str]) -> None:
    # Wide elements first: then every tensor begins at a multiple of its element size, whatever the mix.
    ordered = sorted(items, key=lambda item: -BITS[item.dtype])
    header = encode_header({item.name: (item.dtype, item.shape, item.nbytes) for item in ordered}, metadata)
    _write(path, [header, *map(_Data, ordered)])


@dataclass(frozen=True)
class _Data:
    """The bytes of an item, made when it is written and dropped right after."""

    item: _Item

    def bytes(self) -> memoryview:
        made = self.item.load()
        promised, found = (self.item.dtype, self.item.shape), _describe(made)
        if promised != found:
            raise InputError(f"Tensor {self.item.name!r} was announced as {promised}, but is {found}.")
        return _as_bytes(made)


def _write(path: Path, parts: Iterable[bytes | memoryview | _Data]) -> None:
    with path.open("xb", buffering=0) as file:
        for part in parts:
            data = part.bytes() if isinstance(part, _Data) else memoryview(part)
            for begin in range(0, data.nbytes, _CHUNK_BYTES):
                _write_all(file, data[begin : begin + _CHUNK_BYTES])
        os.fsync(file.fileno())


def _write_all(file: Any, data: memoryview) -> None:
    """A raw write may take only a part: on a nearly full disk, or at a size limit."""
    while data:
        data = data[file.write(data) :]


def _as_bytes(tensor: Any) -> memoryview:
    """The elements in row-major order, little-endian, without a copy where the tensor is contiguous on the CPU."""
    import numpy as np

    if type(tensor).__module__.partition(".")[0] != "torch" and not hasattr(tensor, "detach"):
        array = np.ascontiguousarray(np.asarray(tensor))
    else:
        import torch

        array = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.reshape(-1).view(np.uint8).data


def _index(names: Sequence[str], shards: Sequence[Sequence[_Item]]) -> bytes:
    items = [item for shard in shards for item in shard]
    weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
    parameters = sum(item.nbytes * 8 // BITS[item.dtype] for item in items)
    return encode_index(weight_map, sum(item.nbytes for item in items), parameters)


def _explain(error: OSError, directory: Path) -> OSError:
    if isinstance(error, CheckpointError):
        return error
    free = ""
    if directory.is_dir():
        free = f" {shutil.disk_usage(directory).free} bytes are free there."
    return CheckpointError(
        f"Saving into {str(directory)!r} failed: {error.strerror or error}.{free} What was there before is unchanged; "
        "free some space or fix the permissions, and save again."
    )
