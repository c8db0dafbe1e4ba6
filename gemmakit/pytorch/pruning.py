"""Taking attention heads out of a model; `config.pruned_heads` then says which, and with it the shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.errors import InputError


@torch.no_grad()
def prune_heads(model: Any, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
    """Take query heads out of a model, and the kv heads that then serve none; all is checked before anything changes.

    Args:
        model: any Gemma model.
        heads_to_prune: {layer: query heads}, in the numbers of the unpruned model; what is gone already is ignored.

    Raises:
        ConfigError: see `GemmaConfig.heads`.
        InputError: projections that are no plain linear layers (adapters, quantized).
    """
    config = model.config
    before: dict[int, list[int]] = config.pruned_heads
    after = {**before, **{layer: sorted({*before.get(layer, ()), *heads}) for layer, heads in heads_to_prune.items()}}
    plans = {layer: (config.heads(layer), config.heads(layer, after[layer])) for layer in heads_to_prune}
    layers = model.base_model.layers
    for layer in plans:
        _require_plain(layers[layer].self_attn, layer)
    for layer, ((queries, kv), (left, left_kv)) in plans.items():
        attention, H = layers[layer].self_attn, config.head_dim
        _select(attention.q_proj, 0, _features(queries, left, H))
        for projection in (attention.k_proj, attention.v_proj):
            _select(projection, 0, _features(kv, left_kv, H))
        _select(attention.o_proj, 1, _features(queries, left, H))
        attention.num_key_value_groups = len(left) // len(left_kv)
    config.pruned_heads = {layer: heads for layer, heads in sorted(after.items()) if heads}


def _require_plain(attention: Any, layer: int) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        projection = getattr(attention, name)
        if not isinstance(projection, nn.Linear) or not projection.weight.is_floating_point():
            raise InputError(
                f"{name} of layer {layer} is a {type(projection).__name__}: prune before quantizing, and merge or "
                "remove adapters first."
            )
        if projection.weight.is_meta:
            raise InputError(f"{name} of layer {layer} is offloaded: load the model without offloading to prune it.")


def _features(held: list[int], left: list[int], head_dim: int) -> Tensor:
    """Where the features of the heads `left` are among those of the heads `held`."""
    places = torch.tensor([held.index(head) for head in left])
    return (places[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _select(projection: nn.Linear, axis: int, features: Tensor) -> None:
    """Keep some outputs (axis 0) or inputs (axis 1) of a linear layer."""
    weight = projection.weight
    features = features.to(weight.device)
    projection.weight = nn.Parameter(weight.index_select(axis, features), weight.requires_grad)
    projection.out_features, projection.in_features = projection.weight.shape
    if axis == 0 and projection.bias is not None:
        bias = projection.bias
        projection.bias = nn.Parameter(bias.index_select(0, features), bias.requires_grad)
