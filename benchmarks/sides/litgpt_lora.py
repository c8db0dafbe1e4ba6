"""litgpt's LoRA on the rows of gemmakit_tune.py, in its order. Fields of the spec: model, rank, dtype; lora_loop's."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lora_loop
import side


def train(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    torch.set_num_threads(spec["threads"])
    torch.set_default_dtype(getattr(torch, spec["dtype"]))
    told = json.loads((Path(spec["model"]) / "config.json").read_text())
    parts = ("query", "key", "value", "projection", "mlp")
    model = GPT(Config.from_name(
        "Gemma-2b", n_layer=told["num_hidden_layers"], lora_r=spec["rank"], lora_alpha=2 * spec["rank"],
        lora_dropout=0.0, **{f"lora_{part}": True for part in parts},
    ))  # fmt: skip
    model.lm_head.weight = model.transformer.wte.weight  # tied
    weights: dict[str, Any] = {}
    copy_weights_hf_llama(model.config, {}, weights, load_file(Path(spec["model"]) / "model.safetensors"))
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"weights that litgpt does not know: {unknown}")
    del weights
    model.max_seq_length = lora_loop.longest(spec)
    mark_only_lora_as_trainable(model)

    def loss_of(ids: Any, labels: Any) -> Any:
        logits = model(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, labels[..., 1:])

    return lora_loop.steps(spec, f"litgpt {version('litgpt')}", model, loss_of)


side.main({"generate": train})
