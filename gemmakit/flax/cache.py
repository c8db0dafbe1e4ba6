"""Keys and values of the tokens already seen, as a pytree of fixed shape: what a traced loop can carry.

A cache is a dictionary: "layers" holds "key" and "value", each (B, K, max_length, H), under "0", "1", ... for each
layer that has keys and values of its own or, for scanned layers, once with a leading layer axis; "index" () int32
counts the places written, the same in every layer.
Only this file knows where a token goes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, PromptTooLong
from gemmakit.layer_spec import LayerSpec

Cache = dict[str, Any]


def new_cache(config: GemmaConfig, batch_size: int, max_length: int, dtype: Any, stacked: bool = False) -> Cache:
    """An empty cache for `batch_size` rows of at most `max_length` tokens. Raises InputError for sizes below 1."""
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
        if size < 1:
            raise InputError(f"{name} is {size}; a cache needs at least 1.")
    specs = config.kv_layers()

    def buffers(spec: LayerSpec, *stack: int) -> dict[str, jax.Array]:
        shape = (*stack, batch_size, spec.num_key_value_heads, max_length, spec.head_dim)
        # Zeros, because a masked position still multiplies: 0 * garbage could be NaN.
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    layers = buffers(specs[0], len(specs)) if stacked else {str(i): buffers(spec) for i, spec in enumerate(specs)}
    return {"layers": layers, "index": jnp.zeros((), jnp.int32)}


def append(
    layer: dict[str, jax.Array], k: jax.Array, v: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Write k, v (B, K, S, H) at place `index` of one layer's buffers; give all keys and values and the new buffers."""
    at = (0, 0, index, 0)
    key = jax.lax.dynamic_update_slice(layer["key"], k.astype(layer["key"].dtype), at)
    value = jax.lax.dynamic_update_slice(layer["value"], v.astype(layer["value"].dtype), at)
    return key, value, {"key": key, "value": value}


def capacity(cache: Cache) -> int:
    """The tokens a row can hold."""
    return jax.tree_util.tree_leaves(cache["layers"])[0].shape[-2]


def rows(cache: Cache) -> int:
    return jax.tree_util.tree_leaves(cache["layers"])[0].shape[-4]


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """Row i becomes what row rows[i] was."""
    return {**cache, "layers": jax.tree_util.tree_map(lambda x: jnp.take(x, rows, axis=-4), cache["layers"])}


def prefilled(cache: Cache, prompt: Cache, copies: int) -> Cache:
    """An empty cache that begins with another's tokens, each row `copies` times."""

    def write(to: jax.Array, held: jax.Array) -> jax.Array:
        held = jnp.repeat(held, copies, axis=-4)
        return jax.lax.dynamic_update_slice(to, held.astype(to.dtype), (0,) * to.ndim)

    layers = jax.tree_util.tree_map(write, cache["layers"], prompt["layers"])
    return {"layers": layers, "index": prompt["index"]}


def check(cache: Cache, batch: int, queries: int) -> None:
    """Raises InputError or PromptTooLong, where the index is known, for a call that the cache cannot take."""
    if not isinstance(cache, dict) or "index" not in cache or "layers" not in cache:
        raise InputError(f"past_key_values is a {type(cache).__name__} that init_cache did not make.")
    if rows(cache) != batch:
        raise InputError(f"the cache holds {rows(cache)} rows and this call has {batch}: make a cache for {batch}.")
    if isinstance(cache["index"], Tracer):
        return  # traced: the caller's loop knows its own length
    held, room = int(cache["index"]), capacity(cache)
    if held + queries > room:
        raise PromptTooLong(
            f"the cache holds {room} tokens and has {held}; {queries} more do not fit. "
            f"Make it with init_cache({batch}, {held + queries}) or more."
        )
