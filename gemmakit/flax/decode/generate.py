"""generate(): arguments in, checked and put in order, the compiled loop, results trimmed."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, NumericalError
from gemmakit.flax.cache import Cache
from gemmakit.flax.decode.beams import search
from gemmakit.flax.decode.prompt import (
    Custom,
    Plan,
    Prompt,
    bucket,
    knobs,
    make_plan,
    prepare,
    refuse_unsupported,
    traced,
)
from gemmakit.flax.decode.step import Given, State, begin, go_on, row_seeds
from gemmakit.flax.loss import known
from gemmakit.generation import GenerationConfig
from gemmakit.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from gemmakit.streamers import StepTokens, StreamEvent, Token, events

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
    variables: Any
    products: Any
    init_cache: Any
    dtype: Any

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
            NotEnoughMemory: on a CPU, for a copy of weights in float32, where native code does not multiply by them.
        """
        call = self._checked(
            input_ids, generation_config, prng_key, params, logits_processor, attention_mask, lora, **settings
        )
        if streamer is not None:
            call.refuse_rows("a streamer")
        with _compiled(trace):
            if "beams" in call.plan.on:
                found, steps, failed, _ = search(*call.code, call.given, call.cache)
            else:
                state = _whole(call) if streamer is None else _streamed(call, streamer)
                found, steps, failed = state.tokens, state.step, state.failed
        return _untrimmed(call, found) if call.inside else _trimmed(call, found, steps, failed)

    def stream(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        tokenizer: Any = None,
        skip_special_tokens: bool = True,
        trace: bool = True,
        **arguments: Any,
    ) -> Generator[StreamEvent]:
        """Continue one prompt and give each token as it comes, as the PyTorch backend does; scores are None.

        arguments: the others of generate(), by name.
        """
        call = self._checked(input_ids, generation_config, **arguments)
        call.refuse_rows("stream")
        return events(_tokens(call, trace), tokenizer, skip_special_tokens)

    def stream_rows(
        self, input_ids: Any = None, generation_config: GenerationConfig | None = None, **arguments: Any
    ) -> Generator[StepTokens]:
        """Continue prompts as generate() does, with its arguments. One step brings it all: the loop is compiled."""
        own = {"eos_token_id": arguments["eos_token_id"]} if "eos_token_id" in arguments else {}
        eos = (generation_config or self.generation_config).updated(**own).eos_token_ids
        out = self.generate(input_ids, generation_config, **arguments)
        width = 1 if input_ids is None else max(1, input_ids.shape[1])
        rows = np.asarray(out.sequences)[:, width:].tolist()
        # Nothing but an end token ends a row early here.
        lengths = [next((i for i, token in enumerate(row, 1) if token in eos), None) for row in rows]
        tokens = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        yield StepTokens(tokens, ["length" if length is None else "eos" for length in lengths])

    def _checked(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None,
        prng_key: jax.Array | None = None,
        params: Any = None,
        logits_processor: Iterable[Custom] | None = None,
        attention_mask: Any = None,
        lora: Any = None,
        **settings: Any,
    ) -> Call:
        config = (generation_config or self.generation_config).updated(**settings)
        config.validate(self.config.vocab_size)
        refuse_unsupported(config)
        if prng_key is not None and config.seed is not None:
            raise InputError("seed and prng_key are both given: give one of them.")
        inside = not known(input_ids, attention_mask)
        prompt = (traced if inside else prepare)(self.config, config, input_ids, attention_mask)
        ids, mask = (prompt.ids, prompt.mask) if inside else prompt.padded()
        room = prompt.new if inside else bucket(prompt.new)
        plan = make_plan(config, prompt.ids.shape[1], room, tuple(logits_processor or ()))
        if self.rules is not None and not inside:
            ids, mask = self.rules.batch(ids), self.rules.batch(mask)
        numbers = knobs(config, prompt.new, prompt.ids.shape[1])
        variables = self.variables(params, lora)
        if not inside and known(*jax.tree.leaves(variables)):
            variables["products"] = self.products(variables["params"], copies=True)
        given = Given(variables, ids, mask, numbers, *_seeds(config, plan, prompt, prng_key))
        cache = self.init_cache(ids.shape[0] * plan.copies, ids.shape[1] + plan.room)
        return Call(config, inside, prompt, (self.module, plan), given, cache)


class Call(NamedTuple):
    """A call that is checked. inside: within a caller's jit. code: what is compiled; given, cache: what it takes."""

    config: GenerationConfig
    inside: bool
    prompt: Prompt
    code: tuple[Any, Plan]
    given: Given
    cache: Cache

    @property
    def plan(self) -> Plan:
        return self.code[1]

    def refuse_rows(self, who: str) -> None:
        """Raises InputError unless tokens can be told one by one."""
        if self.inside or "beams" in self.plan.on or self.prompt.ids.shape[0] * self.plan.copies > 1:
            raise InputError(f"{who} follows one row, outside of jit and without beams: stream rows one at a time.")


def _compiled(trace: bool) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if trace else jax.disable_jit()


def _whole(call: Call) -> State:
    return go_on(*call.code, call.given, begin(*call.code, call.given, call.cache), call.given.knobs["limit"])


def _streamed(call: Call, streamer: Streamer) -> State:
    """The last state, the streamer told of each token and of the end, whatever happens."""
    state = None
    try:
        streamer.put(np.asarray(call.prompt.ids))
        for state in _steps(call):
            if not int(state.failed):
                streamer.put(np.asarray(state.token))
    finally:
        streamer.end()
    assert state is not None
    return state


def _steps(call: Call, trace: bool = True) -> Generator[State]:
    """The state after each token, while there are more to come."""
    with _compiled(trace):
        state = begin(*call.code, call.given, call.cache)
    for step in range(2, call.prompt.new + 2):
        yield state
        if int(state.failed) or bool(state.done.all()) or step > call.prompt.new:
            return
        with _compiled(trace):
            state = go_on(*call.code, call.given, state, np.int32(step))


def _tokens(call: Call, trace: bool) -> Generator[Token]:
    for number, state in enumerate(_steps(call, trace), 1):
        _refuse_failed(state.failed)
        reason = "eos" if bool(state.done.all()) else "length" if number == call.prompt.new else None
        yield Token(int(state.token[0]), reason, None)


def _refuse_failed(step: Any) -> None:
    if int(step):
        raise NumericalError(
            f"step {int(step)}: no token has a finite score (NaN or infinity in the weights or logits, or every "
            "token forbidden). Check weights and processors, or use float32."
        )


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


def _trimmed(call: Call, found: Any, steps: Any, failed: Any) -> Output:
    """Without the padding of the bucket, and no longer than the longest row."""
    _refuse_failed(failed)
    prompt, plan = call.prompt, call.plan
    if "beams" not in plan.on:
        tokens = np.asarray(found)[:, : int(steps)]
        return GenerateDecoderOnlyOutput(sequences=_after(prompt.ids, tokens))
    longest = int(np.asarray(found.lengths).max())
    tokens = np.asarray(found.tokens).reshape(-1, plan.room)[:, :longest]
    scores = jax.device_put(np.asarray(found.scores).reshape(-1)) if call.config.output_scores else None
    return GenerateBeamDecoderOnlyOutput(sequences=_after(prompt.ids, tokens), sequences_scores=scores)


def _after(ids: np.ndarray, tokens: np.ndarray) -> jax.Array:
    copies = tokens.shape[0] // ids.shape[0]
    # Unlike jnp.asarray, this compiles nothing for a new shape.
    return jax.device_put(np.concatenate((np.repeat(ids, copies, axis=0).astype(np.int32), tokens), axis=1))


def _untrimmed(call: Call, found: Any) -> Output:
    """(R, P + new) with padding after the end, for a caller's own trace."""
    prompt, plan = call.prompt, call.plan
    beams = "beams" in plan.on
    tokens = found.tokens.reshape(-1, plan.room) if beams else found
    copies = plan.results if beams else plan.copies
    sequences = jnp.concatenate((jnp.repeat(prompt.ids, copies, axis=0), tokens), axis=1)
    if beams:
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=found.scores.reshape(-1))
    return GenerateDecoderOnlyOutput(sequences=sequences)
