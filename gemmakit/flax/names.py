"""Parameters by path, and layers as one stack or one by one; gemmakit.checkpoint.formats says what files call them.

A parameter's path is its keys in the tree joined by "/": "model/layers/0/self_attn/q_proj/kernel", of shape (in, out).
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gemmakit.checkpoint.formats.msgpack import pytorch_name

__all__ = [
    "PREFIX",
    "flat",
    "is_stacked",
    "nested",
    "pytorch_name",
    "stack_layers",
    "unstack_layers",
]

PREFIX = "model/"

_LAYER = re.compile(r"layers/(\d+)/(.+)")


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
