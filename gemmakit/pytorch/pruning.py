"""Which attention heads a layer still has, and taking heads out of a model.

Query heads are numbered as in the unpruned model, from 0 to N - 1; query head n reads kv head n // (N // K).
`config.pruned_heads`, {layer: [query heads]}, is kept in config.json: it says the shapes of a saved pruned model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError, InputError


def pruned_heads(config: GemmaConfig) -> dict[int, list[int]]:
    """{layer: query heads that are gone}, empty for a whole model. Raises ConfigError for what is no such mapping."""
    stored = config.extra.get("pruned_heads") or {}
    try:
        return {int(layer): sorted({int(head) for head in heads}) for layer, heads in stored.items() if len(heads)}
    except (AttributeError, TypeError, ValueError) as e:
        raise ConfigError(f"pruned_heads is {stored!r}; it must be {{layer: [query heads]}}.") from e


def kept_heads(config: GemmaConfig, layer: int, gone: Iterable[int]) -> tuple[list[int], list[int]]:
    """The query heads and the kv heads that layer `layer` keeps without the query heads `gone`.

    A kv head goes with its last query head. Raises ConfigError for a head that there is not, for a layer without heads,
    and where the kv heads that stay would serve different numbers of query heads, which attention cannot compute.
    """
    N, K = config.num_attention_heads, config.num_key_value_heads
    gone = set(gone)
    wrong = sorted(n for n in gone if not 0 <= n < N)
    if wrong or not 0 <= layer < config.num_hidden_layers:
        raise ConfigError(
            f"head {wrong[0] if wrong else min(gone, default=0)} of layer {layer} does not exist: there are "
            f"{config.num_hidden_layers} layers of {N} heads, counted from 0."
        )
    queries = [n for n in range(N) if n not in gone]
    served = Counter(n // (N // K) for n in queries)
    if not queries:
        raise ConfigError(f"all {N} heads of layer {layer} would go: at least one must stay.")
    if len(set(served.values())) > 1:
        raise ConfigError(
            f"without heads {sorted(gone)}, the key/value heads of layer {layer} would serve "
            f"{', '.join(str(served[g]) for g in sorted(served))} query heads: take whole groups of {N // K}, "
            "or equally many from every group that stays."
        )
    return queries, sorted(served)


def layer_heads(config: GemmaConfig, layer: int) -> tuple[int, int]:
    """How many query heads and kv heads layer `layer` has."""
    if not config.extra.get("pruned_heads"):
        return config.num_attention_heads, config.num_key_value_heads
    queries, kv = kept_heads(config, layer, pruned_heads(config).get(layer, ()))
    return len(queries), len(kv)


@torch.no_grad()
def prune_heads(model: Any, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
    """Take query heads out of a model, and the kv heads that then serve none; all is checked before anything changes.

    Args:
        model: any Gemma model.
        heads_to_prune: {layer: query heads}, in the numbers of the unpruned model; what is gone already is ignored.

    Raises:
        ConfigError: see `kept_heads`. InputError: projections that are no plain linear layers (adapters, quantized).
    """
    config = model.config
    before = pruned_heads(config)
    after = {**before}
    for layer, heads in heads_to_prune.items():
        after[layer] = sorted({*before.get(layer, ()), *heads})
    plans = {n: (kept_heads(config, n, before.get(n, ())), kept_heads(config, n, after[n])) for n in heads_to_prune}
    layers = model.base_model.layers
    for layer in plans:
        _require_plain(layers[layer].self_attn, layer)
    for layer, ((queries, kv), (left, left_kv)) in plans.items():
        attention, H = layers[layer].self_attn, config.head_dim
        _select(attention.q_proj, 0, _features(queries, left, H))
        for projection in (attention.k_proj, attention.v_proj):
            _select(projection, 0, _features(kv, left_kv, H))
        _select(attention.o_proj, 1, _features(queries, left, H))
    config.extra["pruned_heads"] = {layer: heads for layer, heads in sorted(after.items()) if heads}


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
