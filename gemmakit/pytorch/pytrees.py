"""Outputs and caches as nodes of torch's trees: what torch.export, torch.func and DistributedDataParallel look into.

Axis letters: B batch, K kv heads, T positions, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.utils import _pytree

from gemmakit.outputs import ModelOutput
from gemmakit.pytorch.cache import DynamicCache


def _cache_parts(cache: DynamicCache) -> dict[str, Any]:
    """Keys and values of each layer, (B, K, T, H), and what the cache knows of padding and positions."""
    known = {name: part for name in ("mask", "lag") if (part := getattr(cache, name)) is not None}
    return {"keys": [k for k, _ in cache], "values": [v for _, v in cache], **known}


def _cache_of(parts: Iterable[Any], names: list[str]) -> DynamicCache:
    keys, values, *known = parts
    cache = DynamicCache(zip(keys, values, strict=True))
    for name, part in zip(names[2:], known, strict=True):
        setattr(cache, name, part)
    return cache


def _output_of(kind: type[ModelOutput]) -> Any:
    return lambda values, names: kind(**dict(zip(names, values, strict=True)))


def _register(kind: type, items: Callable[[Any], Mapping[str, Any]], make: Any) -> None:
    """items: the parts of a node by their names; make: a node of parts and names."""

    def with_keys(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
        return [(_pytree.MappingKey(name), part) for name, part in items(node).items()], list(items(node))

    _pytree.register_pytree_node(
        kind,
        lambda node: (list(items(node).values()), list(items(node))),
        make,
        serialized_type_name=f"{kind.__module__}.{kind.__name__}",
        flatten_with_keys_fn=with_keys,
    )


def register_nodes() -> None:
    """Called once, when the models are imported."""
    for kind in ModelOutput.__subclasses__():
        _register(kind, lambda out: out, _output_of(kind))
    _register(DynamicCache, _cache_parts, _cache_of)
