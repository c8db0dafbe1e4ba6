"""The index of a sharded checkpoint: which shard holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmakit.errors import CheckpointError
from gemmakit.hub import check_relative

INDEX_LIMIT_BYTES = 100_000_000


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index file, tensor name -> shard name, every shard name checked to stay in its folder.

    `metadata.total_size` is not checked: released checkpoints have wrong ones.
    Raises CheckpointError (not an index) or UnsafeFile (a shard name with `..` or the like), before any shard is read.
    """
    size = path.stat().st_size
    if size > INDEX_LIMIT_BYTES:
        raise CheckpointError(f"{path} has {size} bytes; an index has at most {INDEX_LIMIT_BYTES}. It is damaged.")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint index: {error}. Download or save it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is not a checkpoint index: it has no 'weight_map'. Download or save it again.")
    for shard in dict.fromkeys(_texts(path, weight_map)):
        check_relative(shard)
    return weight_map


def encode_index(weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> bytes:
    """The bytes of `model.safetensors.index.json`; sizes in bytes and in elements."""
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    return (json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2) + "\n").encode()


def check_index(index: Path, weight_map: Mapping[str, str], held: Mapping[str, Mapping[str, Any]]) -> None:
    """CheckpointError unless index and shards agree on every tensor; `held` is shard name -> what that shard holds."""
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise CheckpointError(
                f"{index.name} says that {shard} holds tensor {name!r}, but the shard has {len(held[shard])} tensors "
                "and not this one. Download or save the checkpoint again."
            )
    for shard, names in held.items():
        extra = [name for name in names if weight_map.get(name) != shard]
        if extra:
            raise CheckpointError(
                f"{shard} holds {len(extra)} tensors that {index.name} does not place there, first {extra[0]!r}. "
                "Shards of two checkpoints are mixed: download or save the checkpoint again."
            )


def _texts(path: Path, weight_map: dict[str, Any]) -> list[str]:
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{path} gives tensor {name!r} the shard {shard!r}, which is not a file name.")
    return list(weight_map.values())


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
