"""The token loop, greedy, sampled and streamed: one compiled function for the prompt, one for all steps.

Axis letters: B prompts, R rows (prompts times their copies), P prompt positions, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gemmakit.flax.cache import Cache, new_cache, prefilled
from gemmakit.flax.decode.plan import Plan
from gemmakit.flax.decode.sampling import NO_TOKEN, Knobs, draw, greedy, process, row_keys


class Rows:
    """What every step sees of the rows: the prompt, who is padding, how long each row is. All traced."""

    def __init__(self, module: Any, variables: Any, plan: Plan, ids: jax.Array, mask: jax.Array):
        """ids: (B, P); mask: bool (B, P)."""
        self.module, self.variables, self.plan = module, variables, plan
        self.prompts, self.prompt_mask = ids, mask
        self.ids, prompt_mask = (jnp.repeat(a, plan.copies, axis=0) for a in (ids, mask))
        new = jnp.ones((prompt_mask.shape[0], plan.room), bool)
        self.mask = jnp.concatenate((prompt_mask, new), axis=1)
        self.lengths = prompt_mask.sum(-1)

    def prefill(self, cache: Cache) -> tuple[jax.Array, Cache]:
        """Run the prompts, once each: logits (R, V) and the filled cache (R rows)."""
        B, P = self.prompts.shape
        positions = jnp.maximum(jnp.cumsum(self.prompt_mask, axis=-1) - 1, 0)
        # A cache as long as the prompt: over the whole one, every query would be compared with places still empty.
        module = self.module
        short = new_cache(module.config, B, P, module.dtype, module.scan_layers)
        logits, short = self._run(self.prompts, self.prompt_mask, positions, short)
        return jnp.repeat(logits, self.plan.copies, axis=0), prefilled(cache, short, self.plan.copies)

    def next(self, token: jax.Array, step: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Run the newest token of each row (R,), which is new token number `step` (from 1)."""
        return self._run(token[:, None], self.mask, (self.lengths + step - 1)[:, None], cache)

    def _run(self, ids: jax.Array, mask: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        out = self.module.apply(self.variables, ids, mask, positions, cache, logits_to_keep=1)
        return out.logits[:, -1].astype(jnp.float32), out.past_key_values

    def process(self, scores: jax.Array, step: jax.Array, tokens: jax.Array, knobs: Knobs) -> jax.Array:
        """scores: (R, V); tokens: (R, room), of which `step` are there."""
        ids = jnp.concatenate((self.ids, tokens), axis=1)
        seen = self.mask & (jnp.arange(ids.shape[1]) < self.ids.shape[1] + step)
        return process(self.plan, knobs, scores, step, ids, seen)


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


@functools.partial(jax.jit, static_argnames=("module", "plan"), donate_argnames=("cache",))
def begin(
    module: Any,
    plan: Plan,
    variables: Any,
    cache: Cache,
    ids: jax.Array,
    mask: jax.Array,
    knobs: Knobs,
    seeds: jax.Array,
    base: jax.Array,
) -> State:
    """Run the prompts and choose the first token of each row.

    ids, mask: (B, P) with P one of a few lengths. cache: empty, R rows of P + room places, given up to this function.
    """
    rows = Rows(module, variables, plan, ids, mask)
    logits, cache = rows.prefill(cache)
    R = logits.shape[0]
    state = State(
        step=jnp.int32(0),
        token=jnp.zeros(R, jnp.int32),
        tokens=jnp.full((R, plan.room), plan.pad, jnp.int32),
        done=jnp.zeros(R, bool),
        failed=jnp.int32(0),
        keys=row_keys(seeds, base) if plan.do_sample else None,
        cache=cache,
    )
    return _choose(rows, knobs, state, logits)


@functools.partial(jax.jit, static_argnames=("module", "plan"), donate_argnames=("state",))
def go_on(
    module: Any,
    plan: Plan,
    variables: Any,
    state: State,
    ids: jax.Array,
    mask: jax.Array,
    knobs: Knobs,
    until: jax.Array,
) -> State:
    """Token after token, until `until` of them, or every row is done, or none can be chosen.

    With the limit for `until` it is the whole loop; with one more than before, one step of it, for who wants to see
    every token. The state is given up to this function: its cache is written in place.
    """
    rows = Rows(module, variables, plan, ids, mask)

    def advance(state: State) -> State:
        logits, cache = rows.next(state.token, state.step, state.cache)
        return _choose(rows, knobs, replace(state, cache=cache), logits)

    def going(state: State) -> jax.Array:
        return (state.step < jnp.minimum(until, knobs["limit"])) & ~state.done.all() & (state.failed == 0)

    return jax.lax.while_loop(going, advance, state)


def _choose(rows: Rows, knobs: Knobs, state: State, logits: jax.Array) -> State:
    """Write down the next token of each row; rows that are done get padding. logits: (R, V)."""
    plan = rows.plan
    scores = rows.process(logits, state.step, state.tokens, knobs)
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


def is_one_of(token: jax.Array, few: tuple[int, ...]) -> jax.Array:
    out = jnp.zeros(token.shape, bool)
    for one in few:
        out = out | (token == one)
    return out
