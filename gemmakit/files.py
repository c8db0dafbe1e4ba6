"""Small files, read with a clear error; files of any size, written so that a reader finds the old or the new, whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from gemmakit.errors import CheckpointError

_SAMPLE_BYTES, _SAMPLES = 1 << 16, 256


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it holds anything else."""
    return cast("dict[str, Any]", _read_json(path, dict, "an object"))


def read_json_list(path: Path) -> list[Any]:
    """The array in a JSON file. Raises CheckpointError when it holds anything else."""
    return cast("list[Any]", _read_json(path, list, "an array"))


def _read_json(path: Path, kind: type, called: str) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download or export it again.") from error
    if not isinstance(values, kind):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}; it must be {called}.")
    return values


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """A path beside `path` to write to; what is there at the end takes its place in one step, after it is on disk.

    After an exception `path` is as it was. The folder is made if absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield staged
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Replace the content of `path`, in UTF-8 with line ends as they are."""
    with replacing(path) as staged:
        staged.write_text(content, encoding="utf-8", newline="")


def sampled_digest(paths: Iterable[Path]) -> str:
    """The SHA-256 of files' names, sizes and contents; of large ones pieces all over, so that gigabytes take no time.

    It tells models apart (training changes every tensor); it is no proof against whoever wants to deceive.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def free_disk_bytes(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or will once it is made."""
    folder = next(folder for folder in (path, *path.absolute().parents) if os.path.isdir(folder))
    return shutil.disk_usage(folder).free
