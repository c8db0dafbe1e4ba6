"""Saving named tensors as safetensors, in one file or in shards, without ever leaving half a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gemmakit.checkpoint.arrays import as_bytes, describe, made
from gemmakit.checkpoint.header import BITS, encode_header
from gemmakit.checkpoint.publishing import SAFETENSORS, encode_files
from gemmakit.checkpoint.shards import save_shards
from gemmakit.errors import InputError
from gemmakit.hub import Name, check_relative

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_NO_FILES: Mapping[str, bytes | str] = MappingProxyType({})
_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})


@dataclass(frozen=True)
class _Item:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    value: Any  # an array, or what makes it

    def bytes(self) -> memoryview:
        """Made now, and kept by nobody here."""
        array = made(self.value)
        promised, found = (self.dtype, self.shape), describe(array)
        if promised != found:
            raise InputError(f"Tensor {self.name!r} was announced as {promised}, but is {found}.")
        return as_bytes(array)


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
    limit = parse_size(max_shard_size)
    items, files = _plan_items(tensors), _check_files(extra_files)
    encode = partial(_encode, metadata=metadata)
    return save_shards(Path(directory).expanduser(), SAFETENSORS, items, encode, limit, files)


def _plan_items(tensors: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, _Item]:
    items: dict[str, _Item] = {}
    for name, value in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if not isinstance(name, str) or name == "__metadata__" or name in items:
            raise InputError(f"Tensor names must be text, each once, and not '__metadata__'; found {name!r}.")
        items[name] = _item(name, value)
    return items


def _item(name: str, value: Any) -> _Item:
    dtype, shape = describe(value)
    if dtype not in BITS or BITS[dtype] % 8:
        raise InputError(f"Tensor {name!r} has dtype {dtype}, which cannot be saved. Use one of: {', '.join(BITS)}.")
    return _Item(name, dtype, shape, prod(shape) * BITS[dtype] // 8, value)


def _check_files(files: Mapping[str, bytes | str]) -> dict[str, bytes]:
    for name in files:
        check_relative(name)
        if "/" in name or name == SAFETENSORS.index or name.endswith(SAFETENSORS.suffix):
            raise InputError(f"Extra file {name!r} must have a plain name that no weight file has.")
    return encode_files(files)


def _encode(items: Mapping[str, _Item], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    # Wide elements first: then every tensor begins at a multiple of its element size, whatever the mix.
    ordered = sorted(items.values(), key=lambda item: -BITS[item.dtype])
    yield encode_header({item.name: (item.dtype, item.shape, item.nbytes) for item in ordered}, metadata)
    for item in ordered:
        yield item.bytes()
