"""A cache as one safetensors file, written so that a crash leaves the older file whole.

Axis letters: B batch, K kv heads, T positions, H head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemmakit.checkpoint import Checkpoint
from gemmakit.checkpoint.formats.safetensors import SafetensorsFile
from gemmakit.errors import CheckpointError, InputError
from gemmakit.files import replacing

Pairs = Sequence[tuple[Tensor, Tensor]]
KNOWN = ("mask", "lag")  # of a cache, beside keys and values
_KIND = {"format": "pt", "kind": "gemmakit-cache"}


def save_cache(pairs: Pairs, known: Mapping[str, Tensor | None], path: Path) -> None:
    """Write (keys, values) of each layer, (B, K, T, H), to `path`, and what is not None of `known`."""
    if not pairs:
        raise InputError("the cache is empty: there is nothing to save.")
    tensors = {
        f"layers.{i}.{name}": t.detach().contiguous()
        for i, pair in enumerate(pairs)
        for name, t in zip(("keys", "values"), pair, strict=True)
    }
    tensors |= {name: t.detach().contiguous() for name, t in known.items() if t is not None}
    try:
        with replacing(path) as staged:
            save_file(tensors, staged, metadata=_KIND)
    except Exception as e:
        raise CheckpointError(f"{path} could not be written ({e}); an older file there is untouched.") from e


def load_cache(path: Path, device: torch.device | str) -> tuple[Pairs, dict[str, Tensor]]:
    """(keys, values) of each layer on `device`, and what is there of KNOWN; on the CPU they are maps of the file.

    Raises CheckpointError if `path` holds no cache.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: give what cache.save(path) wrote.")
    with Checkpoint([SafetensorsFile(path)]) as file:
        found = set(file.names())
        known = {name: file.tensor(name).to(device) for name in KNOWN if name in found}
        count = (len(found) - len(known)) // 2
        names = [(f"layers.{i}.keys", f"layers.{i}.values") for i in range(count)]
        if not count or {n for pair in names for n in pair} != found - known.keys():
            raise CheckpointError(f"{path} holds no cache (found {', '.join(file.names()[:3])}).")
        return [_pair(file.tensor(k).to(device), file.tensor(v).to(device), path) for k, v in names], known


def _pair(k: Tensor, v: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    if k.dim() != 4 or k.shape != v.shape:
        raise CheckpointError(f"{path} holds keys {tuple(k.shape)} and values {tuple(v.shape)}: not those of a cache.")
    return k, v
