"""One file of each format as named arrays of the PyTorch layout, read lazily, one tensor at a time.

A format is a module here with the names of `Format`, listed in FORMATS. Names are data: a table a format, in google.py
(released PyTorch files), msgpack.py (Flax), orbax.py (google-deepmind/gemma) and gguf.py (llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gemmakit.checkpoint.arrays import TensorInfo
from gemmakit.checkpoint.formats import gguf, google, msgpack, orbax, safetensors

SAFETENSORS, PICKLE, GOOGLE, MSGPACK, ORBAX, GGUF = "safetensors", "pickle", "google", "msgpack", "orbax", "gguf"
# what to call the kinds of files in a report
TITLES = {
    SAFETENSORS: "safetensors",
    PICKLE: "PyTorch pickle",
    GOOGLE: "Google's PyTorch release",
    MSGPACK: "Flax msgpack",
    ORBAX: "Orbax, as google-deepmind/gemma",
    GGUF: "GGUF",
}


class File(Protocol):
    """One file of a checkpoint: what it holds, and its tensors on demand. `kind` is a key of TITLES."""

    kind: str
    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        """One tensor; framework "pt", on `device`, "np" or "flax"."""
        ...

    def close(self) -> None:
        """Let go of what is open; tensors that were handed out stay valid."""
        ...


class Format(Protocol):
    """A format of checkpoint files."""

    def sniff(self, path: Path) -> bool:
        """Whether this file or folder is of the format: by its name, or by its first bytes."""
        ...

    def open(self, path: Path) -> File:
        """Check all that can be checked without reading a tensor. Raises CheckpointError, UnsafeFile."""
        ...


# In the order in which they are asked.
FORMATS: tuple[Format, ...] = (google, msgpack, gguf, orbax, safetensors)


def format_of(path: Path) -> Format | None:
    """The format of a file or folder; None where none knows it."""
    return next((format for format in FORMATS if format.sniff(path)), None)
