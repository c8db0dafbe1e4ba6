"""Saving named arrays, as one file or as shards and an index, so that there is a loadable checkpoint at every instant.

Readers take model.safetensors if it is there, else the shards that model.safetensors.index.json names; likewise
flax_model.msgpack and its index. So one call of the file system decides which checkpoint they see: replacing the single
file, replacing the index, or, from a single file to shards, removing the single file. All else happens before it (under
names nobody reads yet) or after it.

Files are written in a staging folder inside the directory, and moved. The staging folder lists every name that is about
to appear or to become stale; `clean` deletes those that are not part of the checkpoint that readers see, whenever the
save ended: well, by an exception, or by kill -9 (the next save finds the folder).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from gemmakit.checkpoint.arrays import BITS, as_bytes, describe, made
from gemmakit.checkpoint.checkpoint import read_index
from gemmakit.checkpoint.formats import LAYOUTS, Layout
from gemmakit.checkpoint.formats.safetensors import encode_header
from gemmakit.errors import CheckpointError, InputError
from gemmakit.files import free_disk_bytes, replacing
from gemmakit.hub import Name, check_relative

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_NO_FILES: Mapping[str, bytes | str] = MappingProxyType({})
_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
_CHUNK_BYTES = 16 * 2**20
# What a file system takes beside the bytes of the files, and what a format says of a tensor: name, type, shape, place.
_SLACK_BYTES, _BYTES_A_PIECE = 64 * 1024, 256


SAFETENSORS, MSGPACK = (LAYOUTS[kind] for kind in ("safetensors", "msgpack"))
_LAYOUTS = (SAFETENSORS, MSGPACK)
STAGING_PREFIX = ".gemmakit-save-"
_JOURNAL = "journal.json"
_ABANDONED_AFTER_S = 24 * 3600


# -- safetensors -------------------------------------------------------------------------------------------------------


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


def save_file(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] = _METADATA) -> None:
    """One safetensors file of tensors as in `save_checkpoint`, in the place of what is at `path`, whole or not at all.

    Raises CheckpointError where the disk refuses, and InputError.
    """
    items = _plan_items(tensors)
    require_disk(path, [*(item.nbytes for item in items.values()), *map(len, metadata.values())])
    try:
        with replacing(path) as staged:
            write(staged, _encode(items, metadata))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. {free_disk_bytes(path)} bytes are free there. What "
            "was there before is unchanged; free some space or fix the permissions, and save again."
        ) from error


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


def written_order(tensors: Mapping[str, Any], max_shard_size: int | str) -> list[str]:
    """The names in the order in which `save_checkpoint` makes the tensors, each once."""
    shards = split(_plan_items(tensors), parse_size(max_shard_size))
    return [item.name for shard in shards for item in _by_width(shard)]


def _by_width(items: Mapping[str, _Item]) -> list[_Item]:
    """Wide elements first: then every tensor begins at a multiple of its element size, whatever the mix."""
    return sorted(items.values(), key=lambda item: -BITS[item.dtype])


def _encode(items: Mapping[str, _Item], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    ordered = _by_width(items)
    yield encode_header({item.name: (item.dtype, item.shape, item.nbytes) for item in ordered}, metadata)
    for item in ordered:
        yield item.bytes()


# -- one file or shards ------------------------------------------------------------------------------------------------


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
    """The index of the shards `names`; sizes in bytes and in elements."""
    held = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    arrays = [array for shard in shards for array in shard.values()]
    metadata = {
        "total_parameters": sum(prod(array.shape) for array in arrays),
        "total_size": sum(array.nbytes for array in arrays),
    }
    return (json.dumps({"metadata": metadata, "weight_map": held}, indent=2) + "\n").encode()


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


def require_disk(path: Path, sizes: Iterable[int]) -> None:
    """CheckpointError unless pieces of `sizes` bytes fit on the disk of `path`, a file or folder, beside what it holds.

    To be asked before the first byte is written.
    """
    needed = _SLACK_BYTES + sum(_BYTES_A_PIECE + size for size in sizes)
    free = free_disk_bytes(path)
    if needed > free:
        raise CheckpointError(
            f"Saving {str(path)!r} needs {needed} bytes, but the disk has {free} bytes free (what is there already is "
            "kept until the new is whole). Free some space or save elsewhere. Nothing was changed."
        )


# -- in the place of what is there -------------------------------------------------------------------------------------


def live_files(directory: Path, layout: Layout) -> set[str]:
    """The weight files that a reader of `directory` uses now; every file of that suffix if the index cannot be read."""
    if (directory / layout.single).exists():
        return {layout.single}
    index = directory / layout.index
    if not index.exists():
        return set()
    try:
        return {layout.index, *read_index(index).values()}
    except CheckpointError:
        return {layout.index, *(path.name for path in directory.glob(f"*{layout.suffix}"))}


def stale_files(directory: Path, layout: Layout) -> list[str]:
    """What a save into `directory` makes obsolete: the files of the present checkpoint and of an index behind it."""
    names = live_files(directory, layout)
    index = directory / layout.index
    if index.exists():
        names.add(layout.index)
        with suppress(CheckpointError):
            names.update(read_index(index).values())
    return sorted(names - {layout.single})


def publish(staging: Path, layout: Layout, weights: Sequence[str], others: Sequence[str]) -> None:
    """Move the staged files into the directory above; `weights` ends with the file that readers look for.

    `others` (config.json and the like) move right before the switch. After an exception or a kill, `clean` undoes or
    finishes.
    """
    directory = staging.parent
    _write_journal(staging, [*weights, *stale_files(directory, layout)])
    for name in weights[:-1]:
        os.replace(staging / name, directory / name)
    sync_directory(directory)
    for name in others:
        os.replace(staging / name, directory / name)
    os.replace(staging / weights[-1], directory / weights[-1])
    if weights[-1] == layout.index:
        sync_directory(directory)
        (directory / layout.single).unlink(missing_ok=True)
    sync_directory(directory)


def clean(staging: Path) -> None:
    """Delete what the save in `staging` left that is no part of the checkpoint readers see, then the folder itself."""
    directory = staging.parent
    live = set[str]().union(*(live_files(directory, layout) for layout in _LAYOUTS))
    for name in _read_journal(staging):
        if name not in live:
            (directory / name).unlink(missing_ok=True)
    shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def saving_into(directory: Path) -> Generator[Path, None, None]:
    """A staging folder inside `directory`; one save at a time a directory, so that all ranks may save to the same one.

    What killed saves left behind is cleaned on the way in, what this one leaves on the way out. What the system
    refuses, here or in the body, is raised as CheckpointError.
    """
    try:
        with _staging(directory) as staging:
            yield staging
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"Saving into {str(directory)!r} failed: {error.strerror or error}. {free_disk_bytes(directory)} bytes are "
            "free there. What was there before is unchanged; free some space or fix the permissions, and save again."
        ) from error


@contextmanager
def _staging(directory: Path) -> Generator[Path, None, None]:
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory) as alone:
        for abandoned in directory.glob(f"{STAGING_PREFIX}*"):
            if alone or time.time() - abandoned.stat().st_mtime > _ABANDONED_AFTER_S:
                clean(abandoned)
        staging = directory / f"{STAGING_PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
        staging.mkdir()
        try:
            yield staging
        finally:
            clean(staging)


def shard_names(directory: Path, layout: Layout, count: int) -> list[str]:
    """Names for `count` shards, the customary ones unless a file of the present checkpoint may have one of them."""
    stem = layout.single.removesuffix(layout.suffix)
    ends = [f"{i:05d}-of-{count:05d}{layout.suffix}" for i in range(1, count + 1)]
    if any((directory / f"{stem}-{end}").exists() for end in ends):
        stem = f"{stem}-{os.urandom(4).hex()}"
    return [f"{stem}-{end}" for end in ends]


def sync_directory(directory: Path) -> None:
    """Make renames durable where the system can (not on Windows)."""
    if os.name != "nt":
        with _descriptor(directory) as descriptor, suppress(OSError):
            os.fsync(descriptor)


def same_content(path: Path, content: bytes | None) -> bool:
    """Whether `path` already holds exactly `content`: then it need not be touched at all. None is no content."""
    try:
        return content is not None and path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def encode_files(files: Mapping[str, bytes | str]) -> dict[str, bytes]:
    """Small files as bytes; text as UTF-8."""
    return {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}


def _write_journal(staging: Path, names: Sequence[str]) -> None:
    part = staging / f"{_JOURNAL}.part"
    with part.open("w") as file:
        json.dump(list(names), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, staging / _JOURNAL)


def _read_journal(staging: Path) -> list[str]:
    """The listed names, weight files of this very folder only: a journal in a foreign folder must not reach further."""
    try:
        names = json.loads((staging / _JOURNAL).read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(names, list):
        return []
    endings = tuple(ending for layout in _LAYOUTS for ending in (layout.suffix, layout.index))
    return [n for n in names if isinstance(n, str) and Path(n).name == n and n.endswith(endings)]


@contextmanager
def _locked(directory: Path) -> Generator[bool, None, None]:
    """Hold the directory's lock; False where the system has none, and savers cannot tell each other apart."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with _descriptor(directory) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


@contextmanager
def _descriptor(directory: Path) -> Generator[int, None, None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
