"""Small text files, read with a clear error and written so that a reader finds the old or the new content, whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from gemmakit.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download or export it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}; it must be an object.")
    return cast("dict[str, Any]", values)


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path`, its folder made if absent, by replacing the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(content, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
