"""What each kind of checkpoint calls a parameter, as data; and layers as one stack or one by one.

A parameter's path is its keys in the tree joined by "/": "model/layers/0/self_attn/q_proj/kernel", of shape (in, out).
Axis letters: D hidden, F mlp, N heads, K kv heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

PREFIX = "model/"
# Heads that another class of this family may or may not have; only these may be absent from or extra in a file.
HEADS = ("lm_head/", "score/")

# last key of a path -> (its name in PyTorch, whether PyTorch stores it transposed)
PYTORCH: dict[str, tuple[str, bool]] = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "weight": ("weight", False),
    "bias": ("bias", False),
}

Rearrange = Callable[[np.ndarray], np.ndarray]


def _projection(w: np.ndarray) -> np.ndarray:
    """(heads, D, H) -> (D, heads * H)."""
    return w.transpose(1, 0, 2).reshape(w.shape[1], -1)


def _gate(part: int) -> Rearrange:
    return lambda w: w[part]


def _heads(part: int) -> Rearrange:
    return lambda w: _projection(w[part])


# What google-deepmind/gemma writes: path of ours within a layer -> (names it may have there, how it becomes ours).
# Einsum weights: q (N, D, H), kv (2, K, D, H), qkv (3, N, D, H), attn_vec (N, H, D), gating (2, D, F), linear (F, D).
ORBAX_LAYER: dict[str, tuple[tuple[tuple[str, Rearrange], ...], ...]] = {
    "self_attn/q_proj/kernel": ((("attn/q_einsum/w", _projection), ("attn/qkv_einsum/w", _heads(0))),),
    "self_attn/k_proj/kernel": ((("attn/kv_einsum/w", _heads(0)), ("attn/qkv_einsum/w", _heads(1))),),
    "self_attn/v_proj/kernel": ((("attn/kv_einsum/w", _heads(1)), ("attn/qkv_einsum/w", _heads(2))),),
    "self_attn/o_proj/kernel": ((("attn/attn_vec_einsum/w", lambda w: w.reshape(-1, w.shape[-1])),),),
    "mlp/gate_proj/kernel": ((("mlp/gating_einsum", _gate(0)), ("mlp/gating_einsum/w", _gate(0))),),
    "mlp/up_proj/kernel": ((("mlp/gating_einsum", _gate(1)), ("mlp/gating_einsum/w", _gate(1))),),
    "mlp/down_proj/kernel": ((("mlp/linear", lambda w: w), ("mlp/linear/w", lambda w: w)),),
    "input_layernorm/weight": ((("pre_attention_norm/scale", lambda w: w),),),
    "post_attention_layernorm/weight": ((("pre_ffw_norm/scale", lambda w: w),),),
}
