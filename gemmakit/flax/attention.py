"""Attention: one signature, a written-out reference, jax's own fused form behind it, and the module around them.

Axis letters: B batch, S query positions, T key positions, N query heads, K kv heads, H head_dim, D hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError
from gemmakit.flax.cache import append
from gemmakit.flax.layers import FlaxGemmaRMSNorm, FlaxLinear, RotaryTables, rotate
from gemmakit.flax.masks import Visibility
from gemmakit.layer_spec import LayerSpec


class Attend(Protocol):
    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, *, scale: float, softcap: float | None
    ) -> jax.Array: ...


def weights(
    q: jax.Array, k: jax.Array, visible: Visibility, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """The attention weights (B, N, S, T) of q (B, N, S, H) and k (B, K, T, H); softmax in float32.

    Query head n reads kv head n // (N // K). softcap: of the scores, before the mask; see `capped`.
    Source: arXiv:1911.02150, arXiv:2305.13245.
    """
    B, N, S, H = q.shape
    K, T = k.shape[1], k.shape[2]
    dtype = q.dtype
    if q.dtype == jnp.float16:  # XLA's CPU cannot sum float16 products in float32, which their range needs
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    # The heads that share a key stand below each other as rows: no key is copied.
    scores = jnp.einsum("bkgsh,bkth->bkgst", q.reshape(B, K, N // K, S, H), k, preferred_element_type=jnp.float32)
    scores = capped(scores.reshape(B, N, S, T) * scale, softcap)
    mask = visible.mask
    if mask is None and visible.causal:
        mask = jnp.tril(jnp.ones((S, T), bool))
    if mask is not None:
        lowest = jnp.finfo(scores.dtype).min
        scores = jnp.where(mask, scores, lowest) if mask.dtype == bool else scores + mask
    out = jax.nn.softmax(scores, axis=-1).astype(dtype)
    return out if visible.blind is None else jnp.where(visible.blind, 0, out)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap); x itself where there is no cap. Source: arXiv:2408.00118."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights: (B, N, S, T), v: (B, K, T, H) -> (B, N, S, H)."""
    B, N, S, T = weights.shape
    K, H = v.shape[1], v.shape[3]
    out = jnp.einsum("bkgst,bkth->bkgsh", weights.reshape(B, K, N // K, S, T), v)
    return out.reshape(B, N, S, H)


def eager(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """Grouped-query attention written out. A query that may look nowhere gets zeros."""
    return mix(weights(q, k, visible, scale=scale, softcap=softcap), v)


def sdpa(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """The same through `jax.nn.dot_product_attention`, which knows grouped queries too.

    What it does not do, caps, masks that are added and float16 on a CPU, runs as `eager`; so does one query position,
    of which it makes nothing faster.
    """
    additive = visible.mask is not None and visible.mask.dtype != bool
    if q.shape[2] == 1 or additive or q.dtype == jnp.float16 or softcap is not None:
        return eager(q, k, v, visible, scale=scale, softcap=softcap)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    causal = visible.causal and visible.mask is None
    out = jax.nn.dot_product_attention(q, k, v, mask=visible.mask, scale=scale, is_causal=causal)
    out = out.swapaxes(1, 2)
    # Where all is masked it gives the mean of all values.
    return out if visible.blind is None else jnp.where(visible.blind, 0, out)


IMPLEMENTATIONS: dict[str, Attend] = {"eager": eager, "sdpa": sdpa}


def implementation(name: str | None) -> str:
    """The name of a usable attention implementation; None means the default, "sdpa". Raises ConfigError."""
    name = name or "sdpa"
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"attn_implementation is {name!r}; the Flax backend has {', '.join(IMPLEMENTATIONS)}.")
    return name


@struct.dataclass
class Wanted:
    """What a forward pass is to do besides hidden states. All of it is known before tracing.

    positions: of how many of the last positions hidden states are asked for, 0 for all.
    """

    train: bool = struct.field(pytree_node=False, default=False)
    attentions: bool = struct.field(pytree_node=False, default=False)
    hidden_states: bool = struct.field(pytree_node=False, default=False)
    positions: int = struct.field(pytree_node=False, default=0)


KeysAndValues = tuple[jax.Array, jax.Array]


@struct.dataclass
class Told:
    """What a layer is told: its rotary tables, who sees whom, the cache's first free place.

    layer_input: (B, S, P), the embedding of the tokens that is this layer's own. shared: keys and values (B, K, T, H)
    of an earlier layer, as that one saw them, for a layer that has none of its own.
    """

    table: RotaryTables
    visible: Visibility
    index: jax.Array | None = None
    layer_input: jax.Array | None = None
    shared: KeysAndValues | None = None


class FlaxGemmaAttention(nn.Module):
    """Multi-query, grouped-query or multi-head attention with rotary positions.

    A layer that reads another's keys and values has projections of queries alone.
    """

    config: GemmaConfig
    spec: LayerSpec
    dtype: Any = jnp.float32
    wanted: Wanted = Wanted()

    @nn.compact
    def __call__(
        self, hidden: jax.Array, cache: dict[str, jax.Array] | None, told: Told
    ) -> tuple[jax.Array, dict[str, jax.Array] | None, jax.Array | None, KeysAndValues]:
        """hidden: (B, S, D). Returns (B, S, D), the layer's cache, when asked the weights (B, N, S, T), and the keys
        and values that were attended to."""
        c, spec = self.config, self.spec
        B, S, D = hidden.shape
        N, K, H = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim

        def linear(name: str, features: int) -> FlaxLinear:
            return FlaxLinear(features, c.initializer_range, c.attention_bias, self.dtype, name=name)

        def project(name: str, heads: int) -> jax.Array:
            return linear(name, heads * H)(hidden).reshape(B, S, heads, H).swapaxes(1, 2)

        q = project("q_proj", N)
        q = rotate(self.head_norm("q_norm")(q) if c.kind.q_norm else q, *told.table)
        if spec.kv_source is not None:
            assert told.shared is not None
            k, v = told.shared
        else:
            k = project("k_proj", K)
            v = k if spec.values_are_keys else project("v_proj", K)
            k = rotate(self.head_norm("k_norm")(k) if c.kind.k_norm else k, *told.table)
            v = FlaxGemmaRMSNorm(c.rms_norm_eps, weighted=False)(v) if c.kind.v_norm else v
            if cache is not None:
                assert told.index is not None
                k, v, cache = append(cache, k, v, told.index)
                k, v = (told.visible.of(x).astype(self.dtype) for x in (k, v))
        settings: Any = {"scale": spec.scale, "softcap": spec.softcap}
        dropout = c.attention_dropout if self.wanted.train else 0.0
        kept = None
        if self.wanted.attentions or dropout:  # the fused form keeps no weights
            kept = weights(q, k, told.visible, **settings)
            kept = nn.Dropout(dropout)(kept, deterministic=not dropout)
            out = mix(kept, v)
        else:
            out = IMPLEMENTATIONS[c.attn_implementation or "sdpa"](q, k, v, told.visible, **settings)
        out = linear("o_proj", D)(out.swapaxes(1, 2).reshape(B, S, N * H))
        return out, cache, kept if self.wanted.attentions else None, (k, v)

    def head_norm(self, name: str) -> FlaxGemmaRMSNorm:
        return FlaxGemmaRMSNorm(self.config.rms_norm_eps, self.config.kind.norm_offset, name=name)
