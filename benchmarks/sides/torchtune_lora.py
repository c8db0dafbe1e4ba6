"""torchtune's LoRA on the rows of gemmakit_tune.py, in its order. The spec: model, rank, dtype; lora_loop's fields."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lora_loop
import side


def train(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.gemma._component_builders import lora_gemma
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    torch.set_num_threads(spec["threads"])
    torch.set_default_dtype(getattr(torch, spec["dtype"]))
    told = json.loads((Path(spec["model"]) / "config.json").read_text())
    heads, kv_heads, head_dim = (told[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    model = lora_gemma(
        ["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, vocab_size=told["vocab_size"],
        num_layers=told["num_hidden_layers"], num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        embed_dim=told["hidden_size"], intermediate_dim=told["intermediate_size"],
        max_seq_len=told["max_position_embeddings"], lora_rank=spec["rank"], lora_alpha=2 * spec["rank"],
    )  # fmt: skip
    files = load_file(Path(spec["model"]) / "model.safetensors")
    weights = hf_to_tune(files, heads, kv_heads, told["hidden_size"], head_dim)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"weights that torchtune does not know: {unknown}")
    del files, weights
    set_trainable_params(model, get_adapter_params(model))
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)

    def loss_of(ids: Any, labels: Any) -> Any:
        nothing = torch.full((len(labels), 1), -100)
        return loss(model(ids), torch.hstack((labels[:, 1:], nothing)))

    return lora_loop.steps(spec, f"torchtune {version('torchtune')}", model, loss_of)


side.main({"generate": train})
