"""GGUF, the format of llama.cpp: tensors in (`GgufFile`, `open_gguf`) and out (`write_gguf`)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gemmakit.checkpoint.checkpoint import Checkpoint
from gemmakit.checkpoint.gguf.reading import GgufFile
from gemmakit.checkpoint.gguf.writing import write_gguf

__all__ = ["GgufFile", "open_gguf", "write_gguf"]


def open_gguf(path: Path, *, dtype: str = "float32", keep: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in a GGUF file; arguments as of `GgufFile`. Raises CheckpointError."""
    return Checkpoint([GgufFile(path, dtype, keep)])
