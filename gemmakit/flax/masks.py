"""Who may look at whom: causal, windows, padding, bidirectional, packed documents, as one boolean mask a forward pass.

Axis letters: B batch, S query positions, T key positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gemmakit.errors import InputError


@struct.dataclass
class Visibility:
    """What the layers of one window are told about visibility in one forward pass.

    mask: bool (B or 1, 1, S, T), True where a query may look; or the caller's own 4-D additive mask; or None.
    blind: bool (B or 1, 1, S, 1), True for queries that may look nowhere and must give zeros; None if there are none.
    causal: with mask None, whether queries see only keys up to their own place (S == T); otherwise they see all.
    first: () the place of the first key that any query sees, the mask's first column; None for the first of all.
    """

    mask: jax.Array | None = None
    blind: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    first: jax.Array | None = None

    def of(self, keys: jax.Array) -> jax.Array:
        """Of a layer's keys or values (B, K, T, H) those that the mask speaks of: no more than the window's."""
        if self.first is None:
            return keys
        assert self.mask is not None
        return jax.lax.dynamic_slice_in_dim(keys, self.first, self.mask.shape[-1], axis=2)


def visibility(
    attention_mask: jax.Array | None,
    *,
    batch: int,
    queries: int,
    keys: int,
    past: jax.Array | None,
    causal: bool,
    position_ids: jax.Array | None,
    window: int | None = None,
    whole: bool = False,
) -> Visibility:
    """Decide the cheapest true description of who sees whom.

    Args:
        attention_mask: (B, T) 0/1 over past and current tokens; or 4-D, bool or additive, used as it is; or None.
        batch, queries, keys: B, S, T; with a cache T is the whole of it.
        past: () int32, how many places of the cache stand before the first query; None without a cache.
        causal: False lets every token see every other that is not padding.
        position_ids: (B, S) when the caller gave them and there is no cache: a restart begins a document.
        window: a query sees keys less than so many places from its own, itself included; None for all.
        whole: whether to make a mask, and of all T keys, even where less would say it.

    Raises:
        InputError: a mask whose shape does not fit.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return _given(attention_mask, batch, queries, keys)
    window = None if window is None or window >= keys else window
    padding = None if attention_mask is None else _padding(attention_mask, batch, keys, past)
    documents = None if position_ids is None else packed_documents(position_ids, padding)
    if past is None and padding is None and documents is None and window is None and not whole:
        return Visibility(causal=causal and queries > 1)
    first = None
    if past is not None and window is not None and causal and not whole and window + queries - 1 < keys:
        width = window + queries - 1
        first = jnp.clip(past + queries - width, 0, keys - width)
        padding = padding if padding is None else jax.lax.dynamic_slice_in_dim(padding, first, width, axis=1)
        keys = width
    mask = _order(queries, keys, past, causal, window, first)
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    if padding is None:  # a query always sees itself
        return Visibility(mask, first=first)
    return replace(_with_blind(mask & padding[:, None, None, :]), first=first)


def _order(
    queries: int, keys: int, past: jax.Array | None, causal: bool, window: int | None, first: jax.Array | None
) -> jax.Array:
    """bool (1, 1, S, T) by place alone: what comes later, is not written yet or lies outside the window is hidden."""
    place = jnp.arange(keys)[None] + (0 if first is None else first)
    own = jnp.arange(queries)[:, None] + (0 if past is None else past)
    seen = place <= (own if causal else jnp.broadcast_to(own[-1:], own.shape))
    if window is not None:
        seen = seen & (place > own - window) & (place < own + window)
    return seen[None, None]


def _with_blind(mask: jax.Array) -> Visibility:
    blind = ~mask.any(-1, keepdims=True)
    return Visibility(mask | blind, blind)


def _given(mask: jax.Array, batch: int, queries: int, keys: int) -> Visibility:
    ok = mask.shape[0] in (1, batch) and mask.shape[2] in (1, queries) and mask.shape[3] >= keys
    if not ok:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; a 4-D mask for this call is "
            f"({batch}, 1, {queries}, {keys})."
        )
    mask = mask[..., :keys]
    if mask.dtype == bool:
        return _with_blind(mask)
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        raise InputError(
            f"attention_mask is 4-D and {mask.dtype}: give bool, True where a query may look, or a float that is added."
        )
    blind = (mask <= jnp.finfo(mask.dtype).min / 2).all(-1, keepdims=True)
    return Visibility(jnp.where(blind, 0.0, mask), blind)


def _padding(mask: jax.Array, batch: int, keys: int, past: Any) -> jax.Array:
    """The 2-D mask as bool (B, T). Over a cache a mask of the tokens so far is widened: what follows is not written."""
    if mask.ndim != 2 or mask.shape[0] not in (1, batch):
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}; give ({batch}, {keys}) or 4-D.")
    if past is not None and mask.shape[1] < keys:
        mask = jnp.pad(mask, ((0, 0), (0, keys - mask.shape[1])))
    if mask.shape[1] != keys:
        what = "past and current tokens are" if past is None else "the cache holds"
        raise InputError(
            f"attention_mask covers {mask.shape[1]} positions, but {what} {keys}: "
            "give one 0 or 1 for each token in the cache and in this call."
        )
    return mask.astype(bool)


def packed_documents(position_ids: jax.Array, padding: jax.Array | None = None) -> jax.Array | None:
    """Number the packed documents, (B, S), by the places where positions do not go up by one.

    padding: False on tokens that are none and count for nothing; beside it, for positions may leave them out or count
    them, a document begins where positions do not go up at all.
    """
    if position_ids.shape[1] < 2:
        return None
    follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
    if padding is not None:
        place = jnp.where(padding, jnp.arange(padding.shape[1]), -1)
        last = jax.lax.cummax(place, axis=1)[:, :-1]
        before = jnp.take_along_axis(jnp.broadcast_to(position_ids, padding.shape), jnp.maximum(last, 0), axis=1)
        follows = ~padding[:, 1:] | (last < 0) | (position_ids[:, 1:] > before)
    return jnp.pad(jnp.cumsum(~follows, axis=-1), ((0, 0), (1, 0)))
