"""Beam search and beam sampling: the most probable continuations instead of the most probable next token.

Axis letters: B prompts, n beams a prompt, C candidates a prompt, R = B * n rows, V vocabulary.
Scores are sums of log probabilities; what has ended is compared by sum / length ** length_penalty.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gemmakit.flax.cache import Cache, take_rows
from gemmakit.flax.decode.prompt import Plan
from gemmakit.flax.decode.step import Given, Rows, gumbel, is_one_of, row_keys

# Below every real score, yet finite: sums and comparisons stay free of NaN.
UNLIKELY = -1.0e9


@struct.dataclass
class Hypotheses:
    """Some continuations of each prompt.

    tokens: (B, n, room). scores: float32 (B, n). lengths: int32 (B, n). parents: (B, n), the beam each continues.
    ended: bool (B, n).
    """

    tokens: jax.Array
    scores: jax.Array
    lengths: jax.Array
    parents: jax.Array
    ended: jax.Array

    def take(self, index: jax.Array) -> Hypotheses:
        """index: (B, m) -> the m of each prompt that it names."""
        return jax.tree_util.tree_map(lambda x: _pick(x, index), self)

    def best(self, count: int) -> Hypotheses:
        return self.take(jax.lax.top_k(self.scores, count)[1])


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    index = index.reshape(*index.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def _joined(a: Hypotheses, b: Hypotheses) -> Hypotheses:
    return jax.tree_util.tree_map(lambda x, y: jnp.concatenate((x, y), axis=1), a, b)


@struct.dataclass
class Search:
    """step: () new tokens so far. open: bool (B, 1), whether a prompt's running beams may still win. failed as in the
    token loop."""

    step: jax.Array
    running: Hypotheses
    finished: Hypotheses
    open: jax.Array
    going: jax.Array
    failed: jax.Array
    cache: Cache


def _start(B: int, plan: Plan, cache: Cache) -> Search:
    n = plan.copies
    scores = jnp.full((B, n), UNLIKELY)
    none = jnp.zeros((B, n), jnp.int32)
    finished = Hypotheses(jnp.full((B, n, plan.room), plan.pad, jnp.int32), scores, none, none, none > 0)
    # All beams begin equal: only the first may speak, or all would say the same.
    running = replace(finished, scores=scores.at[:, 0].set(0.0))
    return Search(jnp.int32(0), running, finished, jnp.ones((B, 1), bool), jnp.bool_(True), jnp.int32(0), cache)


def _extend(plan: Plan, state: Search, logprobs: jax.Array, keys: jax.Array | None) -> Hypotheses:
    """The likeliest continuations by one token, or drawn ones; so many that n run on even if the best all end."""
    B, n, V = logprobs.shape
    totals = (logprobs + state.running.scores[..., None]).reshape(B, n * V)
    count = min(max(2, 1 + len(plan.eos)) * n, n * V)
    if keys is None:
        scores, index = jax.lax.top_k(totals, count)
    else:  # Gumbel noise and the largest of the sums: a draw without replacement. Source: arXiv:1903.06059.
        index = jax.lax.top_k(totals + gumbel(keys, state.step, n * V), count)[1]
        scores = jnp.take_along_axis(totals, index, axis=1)
    beam, token = index // V, (index % V).astype(jnp.int32)
    out = state.running.take(beam)
    tokens = jax.lax.dynamic_update_slice(out.tokens, token[..., None], (0, 0, state.step))
    return replace(out, tokens=tokens, scores=scores, lengths=out.lengths + 1, parents=beam.astype(jnp.int32),
                       ended=is_one_of(token, plan.eos))  # fmt: skip


def _offer(plan: Plan, knobs: dict[str, Any], state: Search, candidates: Hypotheses, length: jax.Array) -> Hypotheses:
    """What has finished, with the candidates that just ended let in among it."""
    # The candidates after the first n are there as a reserve of beams that run on.
    first = jnp.arange(candidates.ended.shape[1]) < plan.copies
    eligible = candidates.ended & first & state.open
    scores = candidates.scores / length ** knobs["length_penalty"]
    offered = replace(candidates, scores=jnp.where(eligible, scores, -jnp.inf), ended=eligible)
    return _joined(state.finished, offered).best(plan.copies)


def _reconsider(
    plan: Plan, knobs: dict[str, Any], still: jax.Array, finished: Hypotheses, hope: jax.Array, length: jax.Array
) -> jax.Array:
    """Close the prompts whose finished hypotheses no running one can beat any more. hope: (B, 1), the best score.

    early_stopping="never" counts with the longest hypothesis that may come, False with the present length; True does
    not ask, once there are as many as beams.
    """
    if plan.early_stopping is True:
        still = still & ~finished.ended.all(-1, keepdims=True)
    if plan.early_stopping == "never":
        longest = knobs["limit"].astype(jnp.float32)
        length = jnp.where(knobs["length_penalty"] > 0, longest, length)
    worst = jnp.where(finished.ended, finished.scores.min(-1, keepdims=True), UNLIKELY)
    return still & (hope / length ** knobs["length_penalty"] > worst).any(-1, keepdims=True)


def _advance(plan: Plan, knobs: dict[str, Any], state: Search, logprobs: jax.Array, keys: jax.Array | None) -> Search:
    """One more token. logprobs: (B, n, V)."""
    candidates = _extend(plan, state, logprobs, keys)
    step = state.step + 1
    length = step.astype(jnp.float32)
    candidates = replace(candidates, ended=candidates.ended | (step == knobs["limit"]))
    scores = candidates.scores + candidates.ended * UNLIKELY
    best, index = jax.lax.top_k(scores, plan.copies)
    running = replace(candidates.take(index), scores=best)
    finished = _offer(plan, knobs, state, candidates, length)
    still = _reconsider(plan, knobs, state.open, finished, best[:, :1], length)
    top = (logprobs + state.running.scores[..., None]).max((-1, -2))
    usable = jnp.isfinite(top) | ((top == -jnp.inf) & state.finished.ended.any(-1))
    return replace(
        state,
        step=step,
        running=running,
        finished=finished,
        open=still,
        going=still.any() & ~candidates.ended.all(),
        failed=jnp.where(usable.all(), 0, step),
    )


@functools.partial(jax.jit, static_argnames=("module", "plan"), donate_argnames=("cache",))
def search(module: Any, plan: Plan, given: Given, cache: Cache) -> tuple[Hypotheses, jax.Array, jax.Array, Cache]:
    """The finished hypotheses of each prompt, best first; the steps taken, the failed step or 0, and the cache.

    Arguments as of `begin`; seeds: one a prompt.
    """
    rows, knobs = Rows(module, plan, given), given.knobs
    B, n = given.ids.shape[0], plan.copies
    keys = row_keys(given.seeds, given.base) if plan.do_sample else None
    logits, cache = rows.prefill(cache)

    def choose(state: Search, logits: jax.Array) -> Search:
        tokens = state.running.tokens.reshape(B * n, plan.room)
        logprobs = rows.process(jax.nn.log_softmax(logits, axis=-1), state.step, tokens)
        return _advance(plan, knobs, state, logprobs.reshape(B, n, -1), keys)

    def advance(state: Search) -> Search:
        moved = (state.running.parents + jnp.arange(B)[:, None] * n).reshape(B * n)
        newest = jax.lax.dynamic_index_in_dim(state.running.tokens, state.step - 1, axis=2, keepdims=False)
        logits, cache = rows.next(newest.reshape(B * n), state.step, take_rows(state.cache, moved))
        return choose(replace(state, cache=cache), logits)

    def going(state: Search) -> jax.Array:
        return (state.step < knobs["limit"]) & state.going & (state.failed == 0)

    state = jax.lax.while_loop(going, advance, choose(_start(B, plan, cache), logits))
    return state.finished.best(plan.results), state.step, state.failed, state.cache
