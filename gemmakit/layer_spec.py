"""What each layer of a model is made of, by its configuration: a `LayerSpec`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from gemmakit.checks import OneOf, Whole, check
from gemmakit.errors import ConfigError
from gemmakit.family import FULL_ATTENTION, LAYER_TYPES, OPTIONAL, SLIDING_ATTENTION, Kind


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what may differ from layer to layer. `GemmaConfig.layer` makes it; both backends build from it.

    window: keys a query sees, itself included; None for all before it. rope: which rotary table, by the name that
    `GemmaConfig.rope` takes. scale, softcap: scores times scale are capped, softcap * tanh(s / softcap); None for no
    cap. values_are_keys: one projection gives both, which part at their norms. kv_source: the layer whose keys and
    values this one reads; None for its own.
    """

    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    scale: float
    rope: str = FULL_ATTENTION
    window: int | None = None
    softcap: float | None = None
    values_are_keys: bool = False
    kv_source: int | None = None


def layer_spec(config: Any, index: int) -> LayerSpec:
    """What layer `index` of a configuration, counted from 0, is made of."""
    kind: Kind = config.kind
    queries, kv = config.heads(index)
    types = config.layer_types
    own = FULL_ATTENTION if types is None else types[index]
    scalar: float = config.head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    source = _kv_source(config, index)
    return LayerSpec(
        head_dim=head_dim(config, own),
        num_attention_heads=len(queries),
        num_key_value_heads=len(kv),
        intermediate_size=config.intermediate_size * (2 if config.use_double_wide_mlp and source is not None else 1),
        scale=scalar**-0.5 if kind.scale is None else kind.scale,
        rope=own if kind.ropes else FULL_ATTENTION,
        window=_window(config) if own == SLIDING_ATTENTION else None,
        softcap=config.attn_logit_softcapping if kind.capped else None,
        values_are_keys=bool(config.attention_k_eq_v) and own == FULL_ATTENTION,
        kv_source=source,
    )


def head_dim(config: Any, layer_type: str) -> int:
    """Width of a head in layers of this kind."""
    width: int | None = config.global_head_dim if layer_type == FULL_ATTENTION else None
    return config.head_dim if width is None else width


def kv_heads(config: Any, index: int) -> int:
    """Key and value heads of a layer of the unpruned model."""
    apart = config.attention_k_eq_v and config.layer_types[index] == FULL_ATTENTION
    heads: int | None = config.num_global_key_value_heads if apart else None
    return config.num_key_value_heads if heads is None else heads


def _window(config: Any) -> int | None:
    """Keys that a query of a window layer sees on its own side, itself included."""
    window: int | None = config.sliding_window
    return window if window is None or config.is_causal or not config.kind.halves_window else window // 2 + 1


def _kv_source(config: Any, index: int) -> int | None:
    """The layer whose keys and values this one reads, the last of its kind that has any; None for its own."""
    own = config.num_hidden_layers - (config.num_kv_shared_layers or 0)
    if index < own:
        return None
    types = config.layer_types
    return max(i for i in range(own) if types[i] == types[index])


def check_layers(config: Any) -> None:
    """Raises ConfigError for settings of layers that contradict each other, or that the member does not have."""
    kind: Kind = config.kind
    for name in OPTIONAL:
        if name not in kind.defaults and getattr(config, name) is not None:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; {kind.title} has no such setting.")
    sides = (None, False, "all", "vision") if "global_head_dim" in kind.defaults else (None, False, True)
    check("use_bidirectional_attention", config.use_bidirectional_attention, OneOf(*sides), ConfigError)
    if config.enable_moe_block:
        _check_experts(config)
    if config.layer_types is not None:
        _check_types(config, kind, config.layer_types)


def _check_experts(config: Any) -> None:
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if getattr(config, name) is None:
            raise ConfigError(f"enable_moe_block is True and {name} is None: a mixture of experts needs all three of "
                              "num_experts, top_k_experts and moe_intermediate_size.")  # fmt: skip
    check("top_k_experts", config.top_k_experts, Whole(1, config.num_experts), ConfigError)


def _check_types(config: Any, kind: Kind, types: Any) -> None:
    if not isinstance(types, list) or len(cast("list[Any]", types)) != config.num_hidden_layers:
        raise ConfigError(
            f"layer_types is {types!r}; it must be a list that says of each of num_hidden_layers = "
            f"{config.num_hidden_layers} layers what it attends to."
        )
    for i, name in enumerate(cast("list[Any]", types)):
        check(f"layer_types[{i}]", name, OneOf(*LAYER_TYPES), ConfigError)
    if SLIDING_ATTENTION in types and config.sliding_window is None:
        raise ConfigError("layer_types has window layers and sliding_window is None: say how many keys they see.")
    if kind.ends_full and types[-1] != FULL_ATTENTION:
        raise ConfigError(
            f"the last of layer_types is {types[-1]!r}; in {kind.title} the last layer attends to everything: with "
            f"fewer layers than a file has, take a number that ends in a {FULL_ATTENTION!r} one."
        )
    shared = config.num_kv_shared_layers or 0
    if shared:
        check("num_kv_shared_layers", shared, Whole(0, config.num_hidden_layers - 1), ConfigError)
        own = config.num_hidden_layers - shared
        for name in {*types[own:]} - {*types[:own]}:
            raise ConfigError(
                f"num_kv_shared_layers is {shared}: the last {shared} layers read keys and values of earlier ones, and "
                f"none of the first {own} is a {name!r} layer."
            )
        if config.pruned_heads:
            raise ConfigError("pruned_heads takes keys and values away that other layers of this model read.")


def pruned_heads(stored: Any) -> dict[int, list[int]]:
    """What a configuration says is gone, {layer: query heads}; JSON's keys are text. Raises ConfigError."""
    try:
        return {int(layer): sorted({*map(int, heads)}) for layer, heads in (stored or {}).items() if len(heads)}
    except (AttributeError, TypeError, ValueError) as e:
        raise ConfigError(f"pruned_heads is {stored!r}; it must be {{layer: [query heads]}}.") from e


def kept_heads(layer: int, heads: int, kv_heads: int, gone: Collection[int]) -> tuple[list[int], list[int]]:
    """The query heads and the kv heads that a layer keeps without the query heads `gone`.

    Query heads are numbered as in the unpruned model, from 0 to heads - 1; query head n reads kv head
    n // (heads // kv_heads), which goes with its last query head. Raises ConfigError for a head that there is not, and
    where the kv heads that stay would serve different numbers of query heads, which attention cannot compute.
    """
    wrong = sorted(n for n in gone if not 0 <= n < heads)
    if wrong:
        raise ConfigError(f"head {wrong[0]} of layer {layer} does not exist: there are {heads} heads, counted from 0.")
    queries = [n for n in range(heads) if n not in gone]
    served = Counter(n // (heads // kv_heads) for n in queries)
    if not queries:
        raise ConfigError(f"all {heads} heads of layer {layer} would go: at least one must stay.")
    if len(set(served.values())) > 1:
        raise ConfigError(
            f"without heads {sorted(gone)}, the key/value heads of layer {layer} would serve "
            f"{', '.join(str(served[g]) for g in sorted(served))} query heads: take whole groups of "
            f"{heads // kv_heads}, or equally many from every group that stays."
        )
    return queries, sorted(served)
