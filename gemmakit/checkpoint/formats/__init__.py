"""One file of each format as named arrays of the PyTorch layout, read lazily, one tensor at a time.

A format is a module here with the names of `Format`, listed in FORMATS. Names are data: a table a format, in google.py
(released PyTorch files), msgpack.py (Flax), orbax.py (google-deepmind/gemma) and gguf.py (llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Layout:
    """How the weight files of a format are called: `single` is the one file that readers look for first."""

    stem: str
    suffix: str
    dot: str = ""  # ".fp16" for the variant fp16

    @property
    def single(self) -> str:
        return f"{self.stem}{self.dot}{self.suffix}"

    @property
    def index(self) -> str:
        """What they look for then: the index of the shards."""
        return f"{self.stem}{self.suffix}.index{self.dot}.json"

    def of(self, variant: str | None) -> Layout:
        """The names of a variant's files."""
        return replace(self, dot=f".{variant}") if variant else self


# In the order in which a folder or a Hub id is searched.
LAYOUTS = {
    SAFETENSORS: Layout("model", ".safetensors"),
    MSGPACK: Layout("flax_model", ".msgpack"),
    PICKLE: Layout("pytorch_model", ".bin"),
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
