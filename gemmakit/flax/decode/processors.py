"""What settings do to the scores of a step, in the order of docs/generation.md, which PyTorch's processors have too.

Axis letters: R rows, n tokens of a row (prompt, new ones and room for more), V vocabulary. Scores are float32 (R, V).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemmakit.flax.decode.prompt import Plan

FORBIDDEN = -jnp.inf


def process(
    plan: Plan, knobs: dict[str, Any], scores: jax.Array, step: jax.Array, ids: jax.Array, seen: jax.Array
) -> jax.Array:
    """The scores (R, V) as the settings have them.

    step: () new tokens so far. ids: (R, n), prompt and new tokens; seen: bool like ids, True where there is a token.
    """
    length = ids.shape[1] - plan.room + step
    if "repetition_penalty" in plan.on:
        scores = penalized(scores, knobs["repetition_penalty"], presence(ids, seen, scores.shape[-1]))
    if plan.no_repeat_ngram_size:
        scores = without_repeats(scores, plan.no_repeat_ngram_size, ids, seen, length)
    if "minimum" in plan.on:
        scores = jnp.where(step < knobs["minimum"], without(scores, plan.eos), scores)
    if plan.force_first:
        scores = jnp.where(step == 0, only(scores, plan.force_first), scores)
    if plan.force_last:
        scores = jnp.where(step == knobs["limit"] - 1, only(scores, plan.force_last), scores)
    if plan.suppress:
        scores = without(scores, plan.suppress)
    if plan.suppress_first:
        # A forced first token is followed by the first that is chosen.
        chosen = 1 if plan.force_first else 0
        scores = jnp.where(step == chosen, without(scores, plan.suppress_first), scores)
    for change in plan.custom:
        scores = change(ids, scores, length)
    scores = _truncated(plan, knobs, scores)
    return jax.nn.log_softmax(scores, axis=-1) if "renormalize_logits" in plan.on else scores


def _truncated(plan: Plan, knobs: dict[str, Any], scores: jax.Array) -> jax.Array:
    """Temperature, top-k, top-p, min-p. Every one leaves at least `plan.keep` tokens."""
    if "temperature" in plan.on:
        scores = scores / knobs["temperature"]
    if "top_k" in plan.on:
        scores = top_k(scores, jnp.maximum(knobs["top_k"], plan.keep))
    if "top_p" in plan.on:
        scores = top_p(scores, knobs["top_p"], plan.keep)
    return min_p(scores, knobs["min_p"], plan.keep) if "min_p" in plan.on else scores


def top_k(scores: jax.Array, k: Any) -> jax.Array:
    """The k largest, and what equals the last of them."""
    descending = -jnp.sort(-scores, axis=-1)
    least = jnp.take(descending, jnp.clip(k, 1, scores.shape[-1]) - 1, axis=-1)[:, None]
    return jnp.where(scores < least, FORBIDDEN, scores)


def top_p(scores: jax.Array, p: Any, keep: int) -> jax.Array:
    """The likeliest that make up the share p together, and at least `keep`."""
    order = jnp.argsort(scores, axis=-1)
    ascending = jnp.take_along_axis(scores, order, axis=-1)
    drop = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    drop = drop & (jnp.arange(scores.shape[-1]) < scores.shape[-1] - keep)
    return jnp.where(jnp.take_along_axis(drop, jnp.argsort(order, axis=-1), axis=-1), FORBIDDEN, scores)


def min_p(scores: jax.Array, share: Any, keep: int) -> jax.Array:
    """Those with at least this share of the likeliest one's probability, and at least `keep`."""
    probabilities = jax.nn.softmax(scores, axis=-1)
    floor = share * probabilities.max(-1, keepdims=True)
    floor = jnp.minimum(floor, jax.lax.top_k(probabilities, keep)[0][:, -1:])
    return jnp.where(probabilities < floor, FORBIDDEN, scores)


def presence(ids: jax.Array, seen: jax.Array, vocabulary: int) -> jax.Array:
    """bool (R, V): which tokens a row has. ids: (R, any), of which those count where `seen`, bool, is True."""
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocabulary), bool).at[rows, ids].max(seen)


def penalized(scores: jax.Array, penalty: Any, where: jax.Array) -> jax.Array:
    """Divided by the penalty if positive, multiplied if not. Source: arXiv:1909.05858, section 4.1."""
    return jnp.where(where, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def without_repeats(scores: jax.Array, size: int, ids: jax.Array, seen: jax.Array, length: Any) -> jax.Array:
    """Without what would complete an n-gram of `size` tokens a second time. Source: arXiv:1705.04304, section 2.5.

    length: how many of ids are there, padding included; one with fewer than `size` - 1 has nothing to complete.
    """
    n = ids.shape[1]
    if size > n:
        return scores
    starts = n - size + 1  # n-grams of a row, those not there yet among them
    ending = jax.lax.dynamic_slice_in_dim(ids, jnp.maximum(length - size + 1, 0), max(size - 1, 1), axis=1)
    same = jnp.ones((ids.shape[0], starts), bool)
    for i in range(size):
        same = same & seen[:, i : i + starts]
        if i < size - 1:
            same = same & (ids[:, i : i + starts] == ending[:, i : i + 1])
    same = same & (length >= size - 1)
    return jnp.where(presence(ids[:, size - 1 :], same, scores.shape[-1]), FORBIDDEN, scores)


def without(scores: jax.Array, tokens: Sequence[int]) -> jax.Array:
    """None of these tokens."""
    return scores.at[:, jnp.asarray(tokens)].set(FORBIDDEN)


def only(scores: jax.Array, tokens: Sequence[int]) -> jax.Array:
    """One of these tokens, whatever the scores."""
    return jnp.full_like(scores, FORBIDDEN).at[:, jnp.asarray(tokens)].set(0.0)
