"""Random weights in a shape of Gemma, as files that every program reads, or as the fields to make them from.

Speed does not depend on what the weights are, memory and bytes do not either; quality does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gemmakit import GemmaConfig, GemmaForCausalLM
from gemmakit.bench.measure import STD, size_config
from gemmakit.checkpoint import LazyTensor, save_checkpoint


def fields(size: str) -> dict[str, Any]:
    """The fields of a size that any library's GemmaConfig takes."""
    config = size_config(size)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def shapes(config: GemmaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of a checkpoint's tensors, the tied head left out."""
    with torch.device("meta"):
        model = GemmaForCausalLM(config)
    for name, tensor in model.state_dict().items():
        if name not in (model.tied_weights if config.tie_word_embeddings else ()):
            yield name, tuple(tensor.shape)


def write_random(folder: Path, config: GemmaConfig, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A checkpoint of weights drawn from N(0, 0.02), norms zero, in the released layout; never all in memory at once.

    Raises CheckpointError where the disk lacks room.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        kind = getattr(torch, dtype)
        if len(shape) == 1:
            return torch.zeros(shape, dtype=kind)
        out = torch.empty(shape, dtype=kind)
        for rows in out.split(max(1, (1 << 25) // shape[1])):  # 128 MB of float32 at a time
            rows.copy_(torch.empty(rows.shape).normal_(0.0, STD, generator=generator))
        return out

    config.architectures, config.dtype = ["GemmaForCausalLM"], dtype
    lazy = {name: LazyTensor(dtype, shape, lambda shape=shape: drawn(shape)) for name, shape in shapes(config)}
    save_checkpoint(lazy, folder, max_shard_size="5GB", extra_files={"config.json": config.to_json_string()})
    return folder


def cached_random(size: str, dtype: str = "bfloat16", say: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of such a checkpoint, written on first use under GEMMAKIT_BENCH_CACHE or the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("GEMMAKIT_BENCH_CACHE") or Path(caches, "gemmakit", "bench")) / f"{size}-{dtype}"
    if not (folder / "config.json").exists():
        say(f"writing random weights of the {size} shape to {folder}, kept there for the next time")
        write_random(folder, size_config(size), dtype)
    return folder
