"""Putting a new checkpoint in the place of an old one so that there is a loadable one at every instant.

Readers take model.safetensors if it is there, else the shards that model.safetensors.index.json names. So one call of
the file system decides which checkpoint they see: replacing model.safetensors, replacing the index, or, from a single
file to shards, removing model.safetensors. All else happens before it (under names nobody reads yet) or after it.

Files are written in a staging folder inside the directory, and moved. The staging folder lists every name that is about
to appear or to become stale; `clean` deletes those that are not part of the checkpoint that readers see, whenever the
save ended: well, by an exception, or by kill -9 (the next save finds the folder).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gemmakit.checkpoint.index import read_index
from gemmakit.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STAGING_PREFIX = ".gemmakit-save-"
_JOURNAL = "journal.json"
_ABANDONED_AFTER_S = 24 * 3600


def live_files(directory: Path) -> set[str]:
    """The weight files that a reader of `directory` uses now; every .safetensors file if the index cannot be read."""
    if (directory / SINGLE).exists():
        return {SINGLE}
    index = directory / INDEX
    if not index.exists():
        return set()
    try:
        return {INDEX, *read_index(index).values()}
    except CheckpointError:
        return {INDEX, *(path.name for path in directory.glob("*.safetensors"))}


def stale_files(directory: Path) -> list[str]:
    """What a save into `directory` makes obsolete: the files of the present checkpoint and of an index behind it."""
    names = live_files(directory)
    index = directory / INDEX
    if index.exists():
        names.add(INDEX)
        with suppress(CheckpointError):
            names.update(read_index(index).values())
    return sorted(names - {SINGLE})


def publish(staging: Path, weights: Sequence[str], others: Sequence[str]) -> None:
    """Move the staged files into the directory above; `weights` ends with the file that readers look for.

    `others` (config.json and the like) move right before the switch. After an exception or a kill, `clean` undoes or
    finishes.
    """
    directory = staging.parent
    _write_journal(staging, [*weights, *stale_files(directory)])
    for name in weights[:-1]:
        os.replace(staging / name, directory / name)
    sync_directory(directory)
    for name in others:
        os.replace(staging / name, directory / name)
    os.replace(staging / weights[-1], directory / weights[-1])
    if weights[-1] == INDEX:
        sync_directory(directory)
        (directory / SINGLE).unlink(missing_ok=True)
    sync_directory(directory)


def clean(staging: Path) -> None:
    """Delete what the save in `staging` left that is no part of the checkpoint readers see, then the folder itself."""
    directory = staging.parent
    live = live_files(directory)
    for name in _read_journal(staging):
        if name not in live:
            (directory / name).unlink(missing_ok=True)
    shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def saving_into(directory: Path) -> Generator[Path, None, None]:
    """A staging folder inside `directory`; one save at a time a directory, so that all ranks may save to the same one.

    What killed saves left behind is cleaned on the way in, what this one leaves on the way out.
    """
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


def shard_names(directory: Path, count: int) -> list[str]:
    """Names for `count` shards, the customary ones unless a file of the present checkpoint may have one of them."""
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if not any((directory / name).exists() for name in names):
        return names
    tag = os.urandom(4).hex()
    return [name.replace("model-", f"model-{tag}-", 1) for name in names]


def sync_directory(directory: Path) -> None:
    """Make renames durable where the system can (not on Windows)."""
    if os.name != "nt":
        with _descriptor(directory) as descriptor, suppress(OSError):
            os.fsync(descriptor)


def same_content(path: Path, content: bytes) -> bool:
    """Whether `path` already holds exactly `content`: then it need not be touched at all."""
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
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
    return [n for n in names if isinstance(n, str) and Path(n).name == n and (n == INDEX or n.endswith(".safetensors"))]


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
