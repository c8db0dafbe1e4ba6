"""What each kind of checkpoint calls a parameter, as data; and layers as one stack or one by one.

A parameter's path is its keys in the tree joined by "/": "model/layers/0/self_attn/q_proj/kernel", of shape (in, out).
Axis letters: D hidden, F mlp, N heads, K kv heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
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


def _same(w: np.ndarray) -> np.ndarray:
    return w


def _projection(w: np.ndarray) -> np.ndarray:
    """(heads, D, H) -> (D, heads * H)."""
    return w.transpose(1, 0, 2).reshape(w.shape[1], -1)


def _rows(w: np.ndarray) -> np.ndarray:
    """(N, H, D) -> (N * H, D)."""
    return w.reshape(-1, w.shape[-1])


def _part(i: int, change: Rearrange = _same) -> Rearrange:
    return lambda w: change(w[i])


# What google-deepmind/gemma writes for Gemma 1: our path -> the names it may have there, and how it becomes ours.
# Shapes there: q (N, D, H), kv (2, K, D, H), qkv (3, N, D, H), attn_vec (N, H, D), gating (2, D, F), linear (F, D).
# Older releases store the two of the MLP as plain arrays, later ones in a dictionary under "w".
ORBAX: dict[str, tuple[tuple[str, Rearrange], ...]] = {
    "embed_tokens/embedding": (("embedder/input_embedding", _same),),
    "norm/weight": (("final_norm/scale", _same),),
    "self_attn/q_proj/kernel": (("attn/q_einsum/w", _projection), ("attn/qkv_einsum/w", _part(0, _projection))),
    "self_attn/k_proj/kernel": (
        ("attn/kv_einsum/w", _part(0, _projection)),
        ("attn/qkv_einsum/w", _part(1, _projection)),
    ),
    "self_attn/v_proj/kernel": (
        ("attn/kv_einsum/w", _part(1, _projection)),
        ("attn/qkv_einsum/w", _part(2, _projection)),
    ),
    "self_attn/o_proj/kernel": (("attn/attn_vec_einsum/w", _rows),),
    "mlp/gate_proj/kernel": (("mlp/gating_einsum", _part(0)), ("mlp/gating_einsum/w", _part(0))),
    "mlp/up_proj/kernel": (("mlp/gating_einsum", _part(1)), ("mlp/gating_einsum/w", _part(1))),
    "mlp/down_proj/kernel": (("mlp/linear", _same), ("mlp/linear/w", _same)),
    "input_layernorm/weight": (("pre_attention_norm/scale", _same),),
    "post_attention_layernorm/weight": (("pre_ffw_norm/scale", _same),),
}
_LAYER = re.compile(r"layers/(\d+)/(.+)")


def pytorch_name(path: str) -> tuple[str, bool]:
    """The name of a parameter in a PyTorch checkpoint, and whether it is transposed there."""
    *above, last = path.split("/")
    name, transposed = PYTORCH[last]
    return ".".join((*above, name)), transposed


def orbax_names(path: str) -> list[tuple[str, Rearrange]]:
    """The names a parameter may have in a checkpoint of google-deepmind/gemma; none for what that has not."""
    path = path.removeprefix(PREFIX)
    layer = _LAYER.fullmatch(path)
    if layer is None:
        return list(ORBAX.get(path, ()))
    number, within = layer.groups()
    return [(f"layer_{number}/{name}", change) for name, change in ORBAX.get(within, ())]


def other_spelling(path: str, held: Iterable[str]) -> str:
    """The same parameter as a file names it that has a head where the model has none, or the other way round."""
    file_has_head = any(name.startswith(PREFIX) for name in held)
    if path.startswith((PREFIX, *HEADS)):
        return path if file_has_head else path.removeprefix(PREFIX)
    return PREFIX + path if file_has_head else path


def flat(params: Any) -> dict[str, Any]:
    """A nested tree as {"a/b/c": leaf}."""
    return {"/".join(path): leaf for path, leaf in flatten_dict(_plain(params)).items()}


def nested(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in params.items()})


def _plain(tree: Any) -> Any:
    """Dictionaries where older code has FrozenDict."""
    return {str(k): _plain(v) for k, v in tree.items()} if hasattr(tree, "items") else tree


def _layers_of(params: Any) -> dict[str, Any] | None:
    inner = params.get("model", params)
    return inner.get("layers")


def is_stacked(params: Any) -> bool:
    """Whether the layers are one stack. A tree without layers (adapters of a head, say) is none."""
    layers = _layers_of(params)
    return layers is not None and "0" not in layers


def stack_layers(params: Any) -> dict[str, Any]:
    """The tree of scanned layers: "layers/self_attn/..." once, with a leading layer axis. Copies; works under jit."""
    if is_stacked(params):
        return params
    out, layers = {}, {}
    for path, leaf in flat(params).items():
        match = _LAYER.fullmatch(path.removeprefix(PREFIX))
        if match is None:
            out[path] = leaf
        else:
            key = ("model/" if path.startswith(PREFIX) else "") + "layers/" + match[2]
            layers.setdefault(key, []).append((int(match[1]), leaf))
    for key, found in layers.items():
        leaves = [leaf for _, leaf in sorted(found, key=lambda item: item[0])]
        out[key] = jnp.stack(leaves)
    return nested(out)


def unstack_layers(params: Any) -> dict[str, Any]:
    """The tree of released checkpoints: "layers/0/self_attn/...", a layer each. Copies; works under jit."""
    if not is_stacked(params):
        return params
    out = {}
    for path, leaf in flat(params).items():
        head, slash, rest = path.rpartition("layers/") if "layers/" in path else ("", "", path)
        if not slash:
            out[path] = leaf
            continue
        out.update({f"{head}layers/{i}/{rest}": leaf[i] for i in range(leaf.shape[0])})
    return nested(out)
