"""Checkpoint files of every kind as arrays by parameter path, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemmakit.checkpoint import Checkpoint
from gemmakit.checkpoint.formats import open_weights
from gemmakit.checkpoint.formats.layout import COMPUTED
from gemmakit.config import GemmaConfig
from gemmakit.flax.names import HEADS, other_spelling, pytorch_name


@dataclass(frozen=True)
class Stored:
    """One parameter in a file: shape and dtype name as the model has them, and how to read it (a view if it can be)."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass
class Source:
    """What a checkpoint holds for one model: path -> Stored, and the names in it that the model has no place for."""

    where: str
    held: dict[str, Stored] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def open_source(
    name: str | os.PathLike[str], paths: Iterable[str], config: GemmaConfig, where: dict[str, Any]
) -> Source:
    """Find the weights of `paths` in a checkpoint of any kind.

    where: what `open_weights` takes besides the name. Raises CheckpointError, UnsafeFile, HubError.
    """
    checkpoint = open_weights(name, vocab_size=config.vocab_size, **where).checkpoint
    held = checkpoint.files[0]
    source = Source(str(held if held.is_dir() else held.parent))
    names = [n.replace(".", "/") for n in checkpoint.names()]
    used: set[str] = set()
    for path in paths:
        stored, transposed = pytorch_name(other_spelling(path, names))
        if stored in checkpoint:
            used.add(stored)
            source.held[path] = _tensor(checkpoint, stored, transposed)
    source.unused = [n for n in checkpoint.names() if n not in used and not n.endswith(COMPUTED)]
    return source


def _tensor(checkpoint: Checkpoint, name: str, transposed: bool) -> Stored:
    info = checkpoint.info(name)

    def read() -> np.ndarray:
        array = checkpoint.tensor(name, framework="np")
        return array.T if transposed else array

    return Stored(info.shape[::-1] if transposed else tuple(info.shape), info.dtype, read)


def is_head(path: str) -> bool:
    return path.startswith(HEADS)
