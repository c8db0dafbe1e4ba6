"""Small files, read with a clear error; files of any size, written so that a reader finds the old or the new, whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from gemmakit.errors import CheckpointError


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


def free_disk_bytes(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or will once it is made."""
    folder = next(folder for folder in (path, *path.absolute().parents) if os.path.isdir(folder))
    return shutil.disk_usage(folder).free
