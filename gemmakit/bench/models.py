"""Models to measure: one that exists, or random weights in a shape of Gemma, on disk or made on the device.

Speed does not depend on what the weights are, memory and bytes do not either; quality does, see quality.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError

SIZES: dict[str, dict[str, int]] = {
    "2b": {},
    "7b": {},
    "tiny": dict(hidden_size=96, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32, vocab_size=2048),
}  # fmt: skip
STD = 0.02
POOL = 16_777_213  # a prime, so that no two rows are alike


def size_config(size: str, **changes: Any) -> GemmaConfig:
    """The configuration of "2b", "7b", or "tiny" (for trying a benchmark out). Raises InputError."""
    if size not in SIZES:
        raise InputError(f"there is no size {size!r}; the sizes are {', '.join(SIZES)}.")
    preset = "2b" if size == "tiny" else size
    return GemmaConfig.preset(preset, **{**SIZES[size], **changes})


def scheme_config(scheme: str | None) -> Any:
    """The quantization of a short name ("int8", "int4", "int4-g128"); None for none. Raises InputError."""
    from gemmakit.quantization import SHORT_NAMES, parse_quantization

    if scheme is None:
        return None
    if scheme not in SHORT_NAMES:
        raise InputError(f"there is no quantization {scheme!r} here; there are {', '.join(SHORT_NAMES)}.")
    return parse_quantization(scheme)


def shapes(config: GemmaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of a checkpoint's tensors, the tied head left out."""
    import torch

    from gemmakit.pytorch.model import GemmaForCausalLM

    with torch.device("meta"):
        model = GemmaForCausalLM(config)
    for name, tensor in model.state_dict().items():
        if name not in (model.tied_weights if config.tie_word_embeddings else ()):
            yield name, tuple(tensor.shape)


def write_random(folder: Path, config: GemmaConfig, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A checkpoint of weights drawn from N(0, 0.02), norms zero, in the released layout; never all in memory at once.

    Raises CheckpointError where the disk lacks room.
    """
    import torch

    from gemmakit.checkpoint import LazyTensor, save_checkpoint

    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: tuple[int, ...]) -> Any:
        kind = getattr(torch, dtype)
        if len(shape) == 1:
            return torch.zeros(shape, dtype=kind)
        out = torch.empty(shape, dtype=kind)
        for rows in out.split(max(1, (1 << 25) // shape[1])):  # 128 MB of float32 at a time
            rows.copy_(torch.empty(rows.shape).normal_(0.0, STD, generator=generator))
        return out

    config.architectures, config.dtype = ["GemmaForCausalLM"], dtype
    lazy = {name: LazyTensor(dtype, shape, lambda shape=shape: drawn(shape)) for name, shape in shapes(config)}
    files = {"config.json": config.to_json_string()}
    save_checkpoint(lazy, folder, max_shard_size="5GB", extra_files=files)
    return folder


def cached_random(size: str, dtype: str = "bfloat16", *, say: Any = None) -> Path:
    """The folder of such a checkpoint, written on first use under GEMMAKIT_BENCH_CACHE or the user's cache folder."""
    base = os.environ.get("GEMMAKIT_BENCH_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gemmakit", "bench"
    )
    folder = Path(base) / f"{size}-{dtype}"
    if not (folder / "config.json").exists():
        if say is not None:
            say(f"writing random weights of the {size} shape to {folder}, kept there for the next time")
        write_random(folder, size_config(size), dtype)
    return folder


def obtain(spec: dict[str, Any]) -> Any:
    """The GemmaForCausalLM of a spec: `model`, a folder or a name on the Hub, or `config`, fields for random weights
    made on the device; dtype ("auto" as stored), device, quantize (a short name, or None).
    """
    import torch

    from gemmakit.pytorch.model import GemmaForCausalLM

    quantization = scheme_config(spec.get("quantize"))
    device = torch.device(spec["device"])
    if "config" not in spec:
        kind = {} if quantization is None else {"quantization_config": quantization}
        return GemmaForCausalLM.from_pretrained(spec["model"], dtype=spec["dtype"], device_map=str(device), **kind)
    return random_model(GemmaConfig(**spec["config"]), getattr(torch, spec["dtype"]), device, quantization)


def random_model(config: GemmaConfig, dtype: Any, device: Any, quantization: Any = None) -> Any:
    """Weights made on the device one after another and quantized at once, as loading a file does: never all twice.

    The same POOL draws are repeated: drawing all of a 7B would take a CPU minutes, and no speed depends on it.
    """
    import torch

    from gemmakit.pytorch.methods import assign
    from gemmakit.pytorch.model import GemmaForCausalLM
    from gemmakit.pytorch.pretrained import HEADS, complete
    from gemmakit.pytorch.quantize import adopt, choose

    with torch.device("meta"):
        model = GemmaForCausalLM(config)
    quantizer = choose(config, quantization, HEADS)
    pool = torch.empty(POOL, device=device).normal_(0.0, STD).to(dtype)
    tied = model.tied_weights if config.tie_word_embeddings else {}
    for name, like in list(model.named_parameters(remove_duplicate=False)):
        if name not in tied:
            tensor = torch.zeros(like.shape, dtype=dtype, device=device)
            if tensor.ndim > 1:
                for part in tensor.view(-1).split(len(pool)):
                    part.copy_(pool[: len(part)])
            if not adopt(quantizer, model, name, tensor, device, dtype):
                assign(model, name, torch.nn.Parameter(tensor))
    model._set_quantizer(quantizer)
    complete(model, [], dtype, device)
    return model.eval()
