"""Attention: one signature, a written-out reference, and jax's own fused form behind it.

Axis letters: B batch, S query positions, T key positions, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from gemmakit.errors import ConfigError
from gemmakit.flax.masks import Visibility


class Attend(Protocol):
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, *, scale: float) -> jax.Array: ...


def weights(q: jax.Array, k: jax.Array, visible: Visibility, *, scale: float) -> jax.Array:
    """The attention weights (B, N, S, T) of q (B, N, S, H) and k (B, K, T, H); softmax in float32.

    Query head n reads kv head n // (N // K). Source: arXiv:1911.02150, arXiv:2305.13245.
    """
    B, N, S, H = q.shape
    K, T = k.shape[1], k.shape[2]
    dtype = q.dtype
    if q.dtype == jnp.float16:  # XLA's CPU cannot sum float16 products in float32, which their range needs
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    # The heads that share a key stand below each other as rows: no key is copied.
    scores = jnp.einsum("bkgsh,bkth->bkgst", q.reshape(B, K, N // K, S, H), k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, N, S, T) * scale
    mask = visible.mask
    if mask is None and visible.causal:
        mask = jnp.tril(jnp.ones((S, T), bool))
    if mask is not None:
        lowest = jnp.finfo(scores.dtype).min
        scores = jnp.where(mask, scores, lowest) if mask.dtype == bool else scores + mask
    out = jax.nn.softmax(scores, axis=-1).astype(dtype)
    return out if visible.blind is None else jnp.where(visible.blind, 0, out)


def mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights: (B, N, S, T), v: (B, K, T, H) -> (B, N, S, H)."""
    B, N, S, T = weights.shape
    K, H = v.shape[1], v.shape[3]
    out = jnp.einsum("bkgst,bkth->bkgsh", weights.reshape(B, K, N // K, S, T), v)
    return out.reshape(B, N, S, H)


def reference(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, *, scale: float) -> jax.Array:
    """Grouped-query attention written out. A query that may look nowhere gets zeros."""
    return mix(weights(q, k, visible, scale=scale), v)


def fused(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, *, scale: float) -> jax.Array:
    """The same through `jax.nn.dot_product_attention`, which knows grouped queries too.

    What it does not do, masks that are added and float16 on a CPU, runs as `reference`; so does one query position, of
    which it makes nothing faster.
    """
    additive = visible.mask is not None and visible.mask.dtype != bool
    if q.shape[2] == 1 or additive or q.dtype == jnp.float16:
        return reference(q, k, v, visible, scale=scale)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    causal = visible.causal and visible.mask is None
    out = jax.nn.dot_product_attention(q, k, v, mask=visible.mask, scale=scale, is_causal=causal)
    out = out.swapaxes(1, 2)
    # Where all is masked it gives the mean of all values.
    return out if visible.blind is None else jnp.where(visible.blind, 0, out)


IMPLEMENTATIONS: dict[str, Attend] = {"eager": reference, "sdpa": fused}


def implementation(name: str | None) -> str:
    """The name of a usable attention implementation; None means the default, "sdpa". Raises ConfigError."""
    name = name or "sdpa"
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"attn_implementation is {name!r}; the Flax backend has {', '.join(IMPLEMENTATIONS)}.")
    return name
