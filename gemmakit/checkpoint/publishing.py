"""Putting a new checkpoint in the place of an old one so that there is a loadable one at every instant.

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
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gemmakit.checkpoint.index import read_index
from gemmakit.errors import CheckpointError
from gemmakit.files import free_disk_bytes


@dataclass(frozen=True)
class Layout:
    """How the weight files of a format are called: `single` is the one file that readers look for first."""

    single: str

    @property
    def index(self) -> str:
        """What they look for then: the index of the shards."""
        return f"{self.single}.index.json"

    @property
    def suffix(self) -> str:
        """How every weight file ends."""
        return Path(self.single).suffix


SAFETENSORS = Layout("model.safetensors")
MSGPACK = Layout("flax_model.msgpack")
_LAYOUTS = (SAFETENSORS, MSGPACK)
STAGING_PREFIX = ".gemmakit-save-"
_JOURNAL = "journal.json"
_ABANDONED_AFTER_S = 24 * 3600


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
