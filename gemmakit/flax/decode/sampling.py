"""From a step's logits to a token a row: what forbids and shapes, and the draw. Everything here is traced.

Axis letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemmakit.flax.decode.plan import Plan

FORBIDDEN = -jnp.inf
NO_TOKEN = -1
Knobs = dict[str, Any]


def process(plan: Plan, knobs: Knobs, scores: jax.Array, step: jax.Array, ids: jax.Array, seen: jax.Array) -> jax.Array:
    """The settings in the order of docs/generation.md, which PyTorch's processors have too.

    scores: float32 (R, V). step: () new tokens so far. ids: (R, P + room), prompt and new tokens; seen: bool like ids,
    True where there is a token.
    """
    if "repetition_penalty" in plan.on:
        scores = _penalized(scores, knobs["repetition_penalty"], _presence(ids, seen, scores.shape[-1]))
    if "minimum" in plan.on:
        scores = jnp.where(step < knobs["minimum"], _without(scores, plan.eos), scores)
    if plan.force_last:
        forced = _only(scores, plan.force_last)
        scores = jnp.where(step == knobs["limit"] - 1, forced, scores)
    if plan.suppress:
        scores = _without(scores, plan.suppress)
    if plan.suppress_first:
        scores = jnp.where(step == 0, _without(scores, plan.suppress_first), scores)
    for change in plan.custom:
        scores = change(ids, scores, ids.shape[1] - plan.room + step)
    scores = _truncated(plan, knobs, scores)
    return jax.nn.log_softmax(scores, axis=-1) if "renormalize_logits" in plan.on else scores


def _truncated(plan: Plan, knobs: Knobs, scores: jax.Array) -> jax.Array:
    """Temperature, top-k, top-p, min-p. Every one leaves at least `plan.keep` tokens."""
    if "temperature" in plan.on:
        scores = scores / knobs["temperature"]
    if "top_k" in plan.on:
        descending = -jnp.sort(-scores, axis=-1)
        k = jnp.clip(jnp.maximum(knobs["top_k"], plan.keep), 1, scores.shape[-1])
        scores = jnp.where(scores < jnp.take(descending, k - 1, axis=-1)[:, None], FORBIDDEN, scores)
    if "top_p" in plan.on:
        order = jnp.argsort(scores, axis=-1)
        ascending = jnp.take_along_axis(scores, order, axis=-1)
        drop = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - knobs["top_p"]
        drop = drop & (jnp.arange(scores.shape[-1]) < scores.shape[-1] - plan.keep)
        scores = jnp.where(jnp.take_along_axis(drop, jnp.argsort(order, axis=-1), axis=-1), FORBIDDEN, scores)
    if "min_p" in plan.on:
        probabilities = jax.nn.softmax(scores, axis=-1)
        floor = knobs["min_p"] * probabilities.max(-1, keepdims=True)
        floor = jnp.minimum(floor, jax.lax.top_k(probabilities, plan.keep)[0][:, -1:])
        scores = jnp.where(probabilities < floor, FORBIDDEN, scores)
    return scores


def greedy(scores: jax.Array) -> jax.Array:
    """scores: (R, V) -> the first largest of each row, (R,), NO_TOKEN where nothing is finite."""
    return jnp.where(jnp.isfinite(scores.max(-1)), jnp.argmax(scores, axis=-1), NO_TOKEN).astype(jnp.int32)


def draw(scores: jax.Array, keys: jax.Array, step: jax.Array) -> jax.Array:
    """One token a row by probability: adding Gumbel noise and taking the largest draws exactly from softmax(scores)."""
    noise = gumbel(keys, step, scores.shape[-1])
    token = jnp.argmax(scores + noise, axis=-1)
    return jnp.where(jnp.isfinite(scores.max(-1)), token, NO_TOKEN).astype(jnp.int32)


def gumbel(keys: jax.Array, step: jax.Array, size: int) -> jax.Array:
    """(R, size), a row from its own key and the step: what a row draws depends on no neighbour."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), (size,)))(keys)


def row_keys(seeds: jax.Array, base: jax.Array) -> jax.Array:
    """seeds: uint32 (R, 3), base: uint32 (2,) -> keys (R, 2)."""

    def one(seed: jax.Array) -> jax.Array:
        key = base
        for part in seed:
            key = jax.random.fold_in(key, part)
        return key

    return jax.vmap(one)(seeds)


def row_seeds(seed: int, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """uint32 (R, 3): the seed's two halves, and how many equal prompts stand above the row."""
    seen: dict[tuple[int, ...], int] = {}
    out = []
    for prompt in prompts:
        copy = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
        out.append((seed >> 32, seed & 0xFFFFFFFF, copy))
    return np.asarray(out, np.uint32)


def _presence(ids: jax.Array, seen: jax.Array, vocabulary: int) -> jax.Array:
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocabulary), bool).at[rows, ids].max(seen)


def _penalized(scores: jax.Array, penalty: jax.Array, where: jax.Array) -> jax.Array:
    """Divided by the penalty if positive, multiplied if not. Source: arXiv:1909.05858, section 4.1."""
    return jnp.where(where, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def _without(scores: jax.Array, tokens: Sequence[int]) -> jax.Array:
    return scores.at[:, jnp.asarray(tokens)].set(FORBIDDEN)


def _only(scores: jax.Array, tokens: Sequence[int]) -> jax.Array:
    return jnp.full_like(scores, FORBIDDEN).at[:, jnp.asarray(tokens)].set(0.0)
