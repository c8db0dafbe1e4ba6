"""Tensor names: the released checkpoint's and GGUF's. Source: llama.cpp's gguf-py/gguf/tensor_mapping.py."""

from __future__ import annotations

import re

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE_BACK = {ours: theirs for theirs, ours in _WHOLE.items()}
_LAYER_BACK = {ours: theirs for theirs, ours in _LAYER.items()}
_THEIR_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUR_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")


def released_name(name: str) -> str | None:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; None for what Gemma does not have."""
    match = _THEIR_LAYER.fullmatch(name)
    if match:
        part = _LAYER.get(match[2])
        return part and f"model.layers.{match[1]}.{part}.{match[3]}"
    owner, _, kind = name.rpartition(".")
    return f"{_WHOLE[owner]}.{kind}" if owner in _WHOLE and kind == "weight" else None


def gguf_name(name: str) -> str | None:
    """The inverse; a model without a head writes the same names without "model."."""
    match = _OUR_LAYER.fullmatch(name if name.startswith(("model.", "lm_head.")) else f"model.{name}")
    if match:
        part = _LAYER_BACK.get(match[2])
        return part and f"blk.{match[1]}.{part}.{match[3]}"
    owner, _, kind = name.rpartition(".")
    owner = owner if owner in _WHOLE_BACK else f"model.{owner}"
    return f"{_WHOLE_BACK[owner]}.{kind}" if owner in _WHOLE_BACK and kind == "weight" else None


def is_norm(name: str) -> bool:
    """Whether this (in the released checkpoint's naming) is a norm's weight w, which GGUF stores as 1 + w."""
    return name.endswith("norm.weight")
