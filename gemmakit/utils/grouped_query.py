"""Fewer key and value heads: a multi-head checkpoint becomes a grouped-query or multi-query one by mean pooling.

Source: arXiv:2305.13245, section 2.1. The result is where training goes on, not a finished model: about 5 % of the
original training recovers the quality, for a cache that is smaller by the ratio of the heads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor

from gemmakit.checks import Whole
from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError, InputError
from gemmakit.pytorch.pretrained import GemmaPreTrainedModel

Model = TypeVar("Model", bound=GemmaPreTrainedModel)


@overload
def to_grouped_query(source: Model, num_key_value_heads: int) -> Model: ...
@overload
def to_grouped_query(
    source: Mapping[str, Tensor], num_key_value_heads: int, config: GemmaConfig
) -> dict[str, Tensor]: ...
def to_grouped_query(source: Any, num_key_value_heads: int, config: GemmaConfig | None = None) -> Any:
    """Pool neighbouring key and value heads into their mean.

    Query heads keep their order: query head n read kv head n // (N // K) and reads the mean of that head's group.

    Args:
        source: a model, or a state dict (then `config` says its shapes). It is not changed.
        num_key_value_heads: kv heads of the result, a divisor of those of the source; 1 is multi-query.
        config: of the state dict.

    Returns:
        A new model of the same class, in the same dtype and on the same device; or a new state dict, whose
        configuration is the source's with `num_key_value_heads` set.

    Raises:
        ConfigError: a number that does not divide the source's. InputError: a state dict without `config`, a pruned
            model, or projections of other shapes.
    """
    model = source if isinstance(source, GemmaPreTrainedModel) else None
    old = config if model is None else model.config
    if old is None:
        raise InputError("a state dict does not say how many heads it has: give config=.")
    heads = old.num_key_value_heads
    if not Whole(1, heads).holds(num_key_value_heads) or heads % num_key_value_heads:
        raise ConfigError(
            f"num_key_value_heads is {num_key_value_heads!r}; it must divide the {heads} key/value heads of the source."
        )
    if old.pruned_heads:
        raise InputError("the model has pruned heads, whose groups are uneven: pool before pruning.")
    weights = cast("Mapping[str, Tensor]", source if model is None else model.state_dict())
    pooled = {name: _pooled(name, t, old, num_key_value_heads) for name, t in weights.items()}
    return pooled if model is None else _rebuilt(model, pooled, num_key_value_heads)


def _pooled(name: str, tensor: Tensor, config: GemmaConfig, heads: int) -> Tensor:
    """A key or value projection, (K * H, D) or its bias (K * H,), with the mean of each group; others as they are."""
    if ".k_proj." not in name and ".v_proj." not in name:
        return tensor
    K, H = config.num_key_value_heads, config.head_dim
    if tensor.shape[0] != K * H or not tensor.is_floating_point():
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; {K} heads of {H} need {K * H} rows of "
            "real numbers (pool before quantizing, merge adapters first)."
        )
    groups = tensor.float().view(heads, K // heads, H, *tensor.shape[1:])
    return groups.mean(1).flatten(0, 1).to(tensor.dtype)


def _rebuilt(model: Model, weights: dict[str, Tensor], heads: int) -> Model:
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = heads
    with torch.device("meta"):
        new = type(model)(config)
    # On meta nothing was drawn; every weight comes from the source, and tables are computed by to_empty's _apply.
    new = new.to(model.dtype).to_empty(device=model.device)
    new.tie_weights()
    new.load_state_dict(weights)
    new.generation_config = copy.deepcopy(model.generation_config)
    return new.train(model.training)
