"""One decoding step, written once: forward, float, processors, pick, pad, end. All of it is traced.

`begin` runs it once after the prompts, `go_on` again and again; beams have its first half, `Rows`.
Axis letters: B prompts, R rows (prompts times their copies), P prompt positions, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gemmakit.flax.cache import Cache, new_cache, prefilled
from gemmakit.flax.decode.processors import process
from gemmakit.flax.decode.prompt import Plan

NO_TOKEN = -1


@struct.dataclass
class Given:
    """What a call gives the compiled code besides the cache.

    variables: parameters and adapters. ids, mask: (B, P), P one of a few lengths. knobs: the numbers of `Plan.on`.
    seeds: uint32, a row that draws each; base: the key they are folded into.
    """

    variables: Any
    ids: Any
    mask: Any
    knobs: dict[str, Any]
    seeds: Any
    base: Any


@struct.dataclass
class State:
    """step: () new tokens so far. token: (R,) the newest. tokens: (R, room). done: bool (R,). failed: () the step that
    had no token to choose, counted from 1, or 0. keys: (R, 2), of rows that draw."""

    step: jax.Array
    token: jax.Array
    tokens: jax.Array
    done: jax.Array
    failed: jax.Array
    keys: jax.Array | None
    cache: Cache


class Rows:
    """What every step sees of the rows: the prompt, who is padding, how long each row is. All traced."""

    def __init__(self, module: Any, plan: Plan, given: Given):
        self.module, self.plan, self.given = module, plan, given
        self.ids, prompt_mask = (jnp.repeat(a, plan.copies, axis=0) for a in (given.ids, given.mask))
        new = jnp.ones((prompt_mask.shape[0], plan.room), bool)
        self.mask = jnp.concatenate((prompt_mask, new), axis=1)
        self.lengths = prompt_mask.sum(-1)

    def prefill(self, cache: Cache) -> tuple[jax.Array, Cache]:
        """Run the prompts, once each: logits (R, V) and the filled cache (R rows)."""
        given, module, (B, P) = self.given, self.module, self.given.ids.shape
        positions = jnp.maximum(jnp.cumsum(given.mask, axis=-1) - 1, 0)
        # A cache as long as the prompt: over the whole one, every query would be compared with places still empty.
        short = new_cache(module.config, B, P, module.dtype, module.scan_layers)
        logits, short = self._run(given.ids, given.mask, positions, short)
        return jnp.repeat(logits, self.plan.copies, axis=0), prefilled(cache, short, self.plan.copies)

    def next(self, token: jax.Array, step: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Run the newest token of each row (R,), which is new token number `step` (from 1)."""
        return self._run(token[:, None], self.mask, (self.lengths + step - 1)[:, None], cache)

    def _run(self, ids: jax.Array, mask: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        out = self.module.apply(self.given.variables, ids, mask, positions, cache, logits_to_keep=1)
        return out.logits[:, -1].astype(jnp.float32), out.past_key_values

    def process(self, scores: jax.Array, step: jax.Array, tokens: jax.Array) -> jax.Array:
        """scores: float32 (R, V); tokens: (R, room), of which `step` are there."""
        ids = jnp.concatenate((self.ids, tokens), axis=1)
        seen = self.mask & (jnp.arange(ids.shape[1]) < self.ids.shape[1] + step)
        return process(self.plan, self.given.knobs, scores, step, ids, seen)

    def choose(self, state: State, logits: jax.Array) -> State:
        """Write down the next token of each row; rows that are done get padding. logits: (R, V)."""
        plan = self.plan
        scores = self.process(logits, state.step, state.tokens)
        token = greedy(scores) if state.keys is None else draw(scores, state.keys, state.step)
        token = jnp.where(state.done, plan.pad, token)
        step = state.step + 1
        return replace(
            state,
            step=step,
            token=jnp.maximum(token, 0),
            tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
            done=state.done | is_one_of(token, plan.eos),
            failed=jnp.where((token == NO_TOKEN).any(), step, state.failed),
        )


@functools.partial(jax.jit, static_argnames=("module", "plan"), donate_argnames=("cache",))
def begin(module: Any, plan: Plan, given: Given, cache: Cache) -> State:
    """Run the prompts and choose the first token of each row.

    cache: empty, R rows of P + room places, given up to this function.
    """
    rows = Rows(module, plan, given)
    logits, cache = rows.prefill(cache)
    R = logits.shape[0]
    state = State(
        step=jnp.int32(0),
        token=jnp.zeros(R, jnp.int32),
        tokens=jnp.full((R, plan.room), plan.pad, jnp.int32),
        done=jnp.zeros(R, bool),
        failed=jnp.int32(0),
        keys=row_keys(given.seeds, given.base) if plan.do_sample else None,
        cache=cache,
    )
    return rows.choose(state, logits)


@functools.partial(jax.jit, static_argnames=("module", "plan"), donate_argnames=("state",))
def go_on(module: Any, plan: Plan, given: Given, state: State, until: jax.Array) -> State:
    """Token after token, until `until` of them, or every row is done, or none can be chosen.

    With the limit for `until` it is the whole loop; with one more than before, one step of it, for who wants to see
    every token. The state is given up to this function: its cache is written in place.
    """
    rows = Rows(module, plan, given)

    def advance(state: State) -> State:
        logits, cache = rows.next(state.token, state.step, state.cache)
        return rows.choose(replace(state, cache=cache), logits)

    def going(state: State) -> jax.Array:
        return (state.step < jnp.minimum(until, given.knobs["limit"])) & ~state.done.all() & (state.failed == 0)

    return jax.lax.while_loop(going, advance, state)


# -- from scores to a token -------------------------------------------------------------------------------------------


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


def is_one_of(token: jax.Array, few: tuple[int, ...]) -> jax.Array:
    out = jnp.zeros(token.shape, bool)
    for one in few:
        out = out | (token == one)
    return out
