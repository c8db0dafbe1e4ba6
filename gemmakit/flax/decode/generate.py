"""generate(): arguments in, checked and put in order, the compiled loop, results trimmed."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, NumericalError
from gemmakit.flax.decode.beam import search
from gemmakit.flax.decode.loop import State, begin, go_on
from gemmakit.flax.decode.plan import Custom, Plan, knobs, make_plan, refuse_unsupported
from gemmakit.flax.decode.prompt import Prompt, bucket, prepare, traced
from gemmakit.flax.decode.sampling import row_seeds
from gemmakit.flax.training import known
from gemmakit.generation import GenerationConfig
from gemmakit.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

Output = GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput


class Streamer(Protocol):
    """Takes the prompt's ids once, then each new token, then the end."""

    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


class GenerationMixin:
    """Gives a causal language model its generate()."""

    config: GemmaConfig
    generation_config: GenerationConfig
    module: Any
    rules: Any
    stored_params: Any
    init_cache: Any
    _stored_form: Any

    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        prng_key: jax.Array | None = None,
        trace: bool = True,
        params: Any = None,
        logits_processor: Iterable[Custom] | None = None,
        *,
        attention_mask: Any = None,
        lora: Any = None,
        streamer: Streamer | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Output:
        """Continue the prompts: greedy, sampled, or by beams.

        All steps are one compiled loop. Prompt and new tokens are padded to one of a few lengths, so that another
        length seldom compiles anew; padding changes no token. Inside a caller's jit nothing is padded, checked or
        trimmed.

        Args:
            input_ids: (B, P) prompt ids, padded on the left if they differ in length; without any prompt the row starts
                from <bos>.
            generation_config: instead of the model's own settings.
            prng_key: draws the samples; with `seed=` row i depends on the seed and its prompt alone; with neither,
                every call draws anew.
            trace: False runs the steps one by one without compiling them, to look into them.
            params: instead of the model's own.
            logits_processor: traced functions of (ids (R, P + room), scores (R, V), how many ids are there) -> scores.
            attention_mask: (B, P), 0 on padding; inferred when the ids begin with the pad token.
            lora: adapters, as `init_lora` makes them.
            streamer: told of every token as it comes (one row, no beams); the loop then comes back after every step.
            tokenizer: accepted as by the PyTorch backend; no setting that this backend has needs it.
            settings: any field of GenerationConfig that this backend has, for this call.

        Returns:
            GenerateDecoderOnlyOutput, of beams GenerateBeamDecoderOnlyOutput with sequences_scores: `sequences` is
            (B * num_return_sequences, P + new), rows that ended early filled with the pad token.

        Raises:
            GenerationConfigError, InputError, TokenOutOfRange: an argument out of range, or one only PyTorch has.
            PromptTooLong: prompt and new tokens do not fit the context.
            NumericalError: a step has no finite score to choose by.
        """
        config = (generation_config or self.generation_config).updated(**settings)
        config.validate(self.config.vocab_size)
        refuse_unsupported(config)
        if prng_key is not None and config.seed is not None:
            raise InputError("seed and prng_key are both given: give one of them.")
        inside = not known(input_ids, attention_mask)
        prompt = (traced if inside else prepare)(self.config, config, input_ids, attention_mask)
        ids, mask = (prompt.ids, prompt.mask) if inside else prompt.padded()
        plan = make_plan(config, prompt.new if inside else bucket(prompt.new), tuple(logits_processor or ()))
        if streamer is not None and (inside or "beams" in plan.on or ids.shape[0] * plan.copies > 1):
            raise InputError("a streamer follows one row, outside of jit and without beams: stream rows one at a time.")
        variables = {"params": self.stored_params if params is None else self._stored_form(params)}
        if lora is not None:
            variables["lora"] = self._stored_form(lora)
        if self.rules is not None and not inside:
            ids, mask = self.rules.batch(ids), self.rules.batch(mask)
        cache = self.init_cache(ids.shape[0] * plan.copies, ids.shape[1] + plan.room)
        first = (self.module, plan, variables, cache, ids, mask, knobs(config, prompt.new, prompt.ids.shape[1]))
        seeds = _seeds(config, plan, prompt, prng_key)
        with contextlib.nullcontext() if trace else jax.disable_jit():
            if "beams" in plan.on:
                found, steps, failed, _ = search(*first, *seeds)
            else:
                found, steps, failed = _decoded(streamer, prompt, first, seeds)
        return _untrimmed(prompt, plan, found) if inside else _trimmed(config, prompt, plan, found, steps, failed)


def _decoded(
    streamer: Streamer | None, prompt: Prompt, first: tuple[Any, ...], seeds: tuple[Any, Any]
) -> tuple[Any, Any, Any]:
    """Tokens (R, room), the steps taken, and the failed one or 0."""
    module, plan, variables, _, ids, mask, numbers = first
    state = begin(*first, *seeds)
    rest = (ids, mask, numbers)
    if streamer is None:
        state = go_on(module, plan, variables, state, *rest, numbers["limit"])
        return state.tokens, state.step, state.failed
    try:
        streamer.put(np.asarray(prompt.ids))
        step = 0
        while _delivered(streamer, state) and step + 1 < prompt.new:
            step += 1
            state = go_on(module, plan, variables, state, *rest, np.int32(step + 1))
    finally:
        streamer.end()
    return state.tokens, state.step, state.failed


def _delivered(streamer: Streamer, state: State) -> bool:
    """Tell of the newest token, if there is one; whether there is more to come."""
    if int(state.failed):
        return False
    streamer.put(np.asarray(state.token))
    return not bool(state.done.all())


def _seeds(config: GenerationConfig, plan: Plan, prompt: Prompt, prng_key: jax.Array | None) -> tuple[np.ndarray, Any]:
    """uint32 (rows that draw, 3), and the key they are folded into."""
    draws = 1 if "beams" in plan.on else plan.copies
    rows = prompt.ids.shape[0] * draws
    numbered = np.asarray([(0, 0, row) for row in range(rows)], np.uint32)
    zero = np.zeros(2, np.uint32)
    if prng_key is not None:
        typed = jnp.issubdtype(prng_key.dtype, jax.dtypes.prng_key)
        return numbered, jax.random.key_data(prng_key) if typed else prng_key
    if not config.do_sample:
        return numbered, zero
    if config.seed is None or not known(prompt.ids, prompt.mask):
        seed = secrets.randbits(63) if config.seed is None else config.seed
        numbered[:, 0], numbered[:, 1] = seed >> 32, seed & 0xFFFFFFFF
        return numbered, zero
    prompts = [ids[seen].tolist() for ids, seen in zip(prompt.ids, prompt.mask, strict=True) for _ in range(draws)]
    return row_seeds(config.seed, prompts), zero


def _trimmed(config: GenerationConfig, prompt: Prompt, plan: Plan, found: Any, steps: Any, failed: Any) -> Output:
    """Without the padding of the bucket, and no longer than the longest row."""
    if int(failed):
        raise NumericalError(
            f"step {int(failed)}: no token has a finite score (NaN or infinity in the weights or logits, or every "
            "token forbidden). Check weights and processors, or use float32."
        )
    if "beams" not in plan.on:
        tokens = np.asarray(found)[:, : int(steps)]
        return GenerateDecoderOnlyOutput(sequences=_after(prompt.ids, tokens))
    longest = int(np.asarray(found.lengths).max())
    tokens = np.asarray(found.tokens).reshape(-1, plan.room)[:, :longest]
    scores = jax.device_put(np.asarray(found.scores).reshape(-1)) if config.output_scores else None
    return GenerateBeamDecoderOnlyOutput(sequences=_after(prompt.ids, tokens), sequences_scores=scores)


def _after(ids: np.ndarray, tokens: np.ndarray) -> jax.Array:
    copies = tokens.shape[0] // ids.shape[0]
    # Unlike jnp.asarray, this compiles nothing for a new shape.
    return jax.device_put(np.concatenate((np.repeat(ids, copies, axis=0).astype(np.int32), tokens), axis=1))


def _untrimmed(prompt: Prompt, plan: Plan, found: Any) -> Output:
    """(R, P + new) with padding after the end, for a caller's own trace."""
    beams = "beams" in plan.on
    tokens = found.tokens.reshape(-1, plan.room) if beams else found
    copies = plan.results if beams else plan.copies
    sequences = jnp.concatenate((jnp.repeat(prompt.ids, copies, axis=0), tokens), axis=1)
    if beams:
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=found.scores.reshape(-1))
    return GenerateDecoderOnlyOutput(sequences=sequences)
