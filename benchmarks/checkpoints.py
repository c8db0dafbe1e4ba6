"""Random weights in a shape of Gemma, as files that every program reads, or as the fields to make them from.

Speed does not depend on what the weights are, memory and bytes do not either; quality does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemmakit import GemmaConfig, GemmaForCausalLM, GemmaTokenizer, demo_model
from gemmakit.bench.measure import STD, size_config
from gemmakit.checkpoint import LazyTensor, save_checkpoint
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.quantization import WeightOnlyConfig, stored_parts
from gemmakit.text.gguf import vocabulary_of


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

    config.architectures, config.dtype = [config.kind.classes["causal_lm"]], dtype
    lazy = {name: LazyTensor(dtype, shape, lambda shape=shape: drawn(shape)) for name, shape in shapes(config)}
    save_checkpoint(lazy, folder, max_shard_size="5GB", extra_files={"config.json": config.to_json_string()})
    return folder


def random_codes(config: GemmaConfig, scheme: WeightOnlyConfig, seed: int = 0) -> dict[str, LazyTensor]:
    """A checkpoint whose codes are drawn, not its numbers, which a large one takes minutes to round; never all at once.

    Steps give numbers of about 0.02. Of the embedding that layers have of their own all rows are alike.
    """
    pool = torch.empty(16_777_213, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(seed))

    def drawn(dtype: str, shape: tuple[int, ...], filled: float | None, alike: bool) -> torch.Tensor:
        kind = getattr(torch, dtype)
        if filled is not None:
            return torch.full((1, 1), filled, dtype=kind).expand(shape)
        if alike:
            return pool[: shape[1]].view(kind).expand(shape)
        out = torch.empty(shape, dtype=kind)
        for piece in out.view(-1).view(torch.uint8).split(len(pool)):
            piece.copy_(pool[: len(piece)])
        return out

    found: dict[str, LazyTensor] = {}
    for name, shape in shapes(config):
        layout = scheme.layout_of(name.removesuffix(".weight"), config.tie_word_embeddings) if len(shape) == 2 else None
        if layout is None:
            start = 0.0 if name.endswith("norm.weight") and config.kind.norm_offset else 1.0
            found[name] = LazyTensor("bfloat16", shape, partial(torch.full, shape, start, dtype=torch.bfloat16))
            continue
        step = STD / (4.6 if layout[0] == 4 else 74.0)  # by the standard deviation of codes that are equally likely
        for part, (dtype, its) in stored_parts(*shape, *layout).items():
            filled = {"_scale": step, "_zero": 8}.get(part)
            make = partial(drawn, dtype, its, filled, "embed_tokens_per_layer" in name)
            found[name + part] = LazyTensor(dtype, its, make)
    return found


def cached_codes(size: str, say: Callable[[str], None] = lambda _: None) -> tuple[Path, Path]:
    """A folder and a GGUF file of the very same weights in 4 bits, embeddings in 8, as `cached_random` keeps them."""
    folder = cache() / f"{size}-codes"
    gguf = folder.with_suffix(".gguf")
    config, scheme = size_config(size), WeightOnlyConfig(bits=4, head_group_size=32)
    if not gguf.exists() or not (folder / "config.json").exists():
        say(f"writing random codes of the {size} shape to {folder} and {gguf}, kept there for the next time")
        config.architectures, config.dtype = [config.kind.classes["causal_lm"]], "bfloat16"
        tensors = random_codes(config, scheme)
        write_gguf(gguf, config, tensors, vocabulary_of(GemmaTokenizer.from_pretrained(demo_model())), "Q4_0")
        config.extra["quantization_config"] = scheme.to_dict()
        save_checkpoint(tensors, folder, max_shard_size="5GB", extra_files={"config.json": config.to_json_string()})
    return folder, gguf


def cache() -> Path:
    """Where checkpoints are kept: GEMMAKIT_BENCH_CACHE, or a folder of the user's cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GEMMAKIT_BENCH_CACHE") or Path(caches, "gemmakit", "bench"))


def cached_random(
    size: str, dtype: str = "bfloat16", say: Callable[[str], None] = lambda _: None, layers: int | None = None
) -> Path:
    """The folder of such a checkpoint, written on first use under GEMMAKIT_BENCH_CACHE or the user's cache folder.

    layers: the first so many alone.
    """
    config = size_config(size)
    fewer = layers is not None and layers != config.num_hidden_layers
    folder = cache() / (f"{size}-{layers}-layers-{dtype}" if fewer else f"{size}-{dtype}")
    if not (folder / "config.json").exists():
        say(f"writing random weights of the {size} shape to {folder}, kept there for the next time")
        write_random(folder, size_config(size, num_hidden_layers=layers) if fewer else config, dtype)
    return folder
