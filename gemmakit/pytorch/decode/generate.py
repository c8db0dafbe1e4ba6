"""generate(): arguments in, checked and put in order, then the strategy they choose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from gemmakit.checks import Accepted, take_accepted
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.generation.settings import DEFAULTS
from gemmakit.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from gemmakit.pytorch.cache import Cache, cache_of
from gemmakit.pytorch.decode import batch, capture, processors, stopping
from gemmakit.pytorch.decode.healing import heal
from gemmakit.pytorch.decode.processors import AllowedTokens
from gemmakit.pytorch.decode.prompt import Prompt, prepare
from gemmakit.pytorch.decode.protocols import CausalLM, LogitsProcessorList
from gemmakit.pytorch.decode.sampling import Exponential, greedy, row_generators, sampler
from gemmakit.pytorch.decode.step import Plan, StepOutputs
from gemmakit.pytorch.decode.strategies import STRATEGIES, Strategy, choose, transition_scores
from gemmakit.pytorch.decode.stream import Steps, Streamer, tokens_of, told
from gemmakit.pytorch.model import check_tensor
from gemmakit.streamers import StepTokens, StreamEvent, events

# What transformers' calls give and what is settled here anyway, or has no meaning for this model.
_ACCEPTED: Accepted = {
    "cache_position": (None, ""),
    "logits_to_keep": (None, ""),
    "token_type_ids": (None, ""),
    "disable_compile": (None, ""),
    "compile_config": (None, ""),
    "synced_gpus": ((None, False), "each process generates by itself; gather the weights of sharded models first"),
    "use_model_defaults": ((None, True), "give a whole GenerationConfig, whose settings replace the model's"),
    "assistant_tokenizer": ((None,), "a draft must have the model's own vocabulary: leave it out"),
    "return_legacy_cache": ((None, False), "call output.past_key_values.to_legacy_cache()"),
}


class GenerationMixin:
    """Gives a causal language model its generate()."""

    config: GemmaConfig
    generation_config: GenerationConfig

    def generate(
        self: CausalLM,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[processors.Processor] | None = None,
        stopping_criteria: Iterable[stopping.Criterion] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        streamer: Streamer | None = None,
        tokenizer: stopping.Decoder | None = None,
        generator: torch.Generator | None = None,
        assistant_model: CausalLM | None = None,
        custom_generate: Callable[..., Any] | None = None,
        prefix_allowed_tokens_fn: AllowedTokens | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
        """Continue the prompts.

        Args:
            inputs, input_ids: (B, P) prompt ids, padded on the left if they differ in length; without any prompt each
                row starts from <bos>.
            attention_mask: (B, P), 0 on padding; inferred when the ids begin with the pad token.
            position_ids: (B or 1, P) of the prompt, after which they count on; by default they count what is not
                padding, after those of the cache.
            inputs_embeds: (B, P, D) instead of ids; the result then holds the new tokens only.
            past_key_values: a cache that already holds the beginning of the ids, or what precedes them.
            generation_config: instead of the model's own settings.
            settings: any field of GenerationConfig, for this call.
            logits_processor: more processors, called as f(ids (B, n), scores (B, V)) -> scores.
            stopping_criteria: called as f(ids, scores) -> bool (B,) or bool.
            streamer: told of every token as it comes (one row only).
            tokenizer: needed for what is about text: stop_strings, token_healing, json_schema, regex, grammar.
            generator: draws the samples; `seed=` makes one a row instead.
            assistant_model: a smaller model of the same vocabulary that drafts tokens for this one to check.
            custom_generate: called instead of a strategy, as f(model, input_ids, logits_processor=, stopping_criteria=,
                generation_config=, attention_mask=, past_key_values=, use_cache=), with the settings that it names and
                that are no fields of GenerationConfig. Code from a checkpoint is never run.
            prefix_allowed_tokens_fn: (prompt's number, ids so far) -> the ids that may come next.
            negative_prompt_ids, negative_prompt_attention_mask: (B or 1, N), what guidance_scale steers away from.

        Returns:
            (B * num_return_sequences, P + new) ids; or with return_dict_in_generate=True a GenerateDecoderOnlyOutput,
            of beams a GenerateBeamDecoderOnlyOutput.

        Raises:
            GenerationConfigError, InputError, TokenOutOfRange: an argument out of range.
            PromptTooLong: prompt and new tokens do not fit the context or the cache.
            NumericalError: a step has no finite score to choose by.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "settings")}
        return begin(self, **arguments, **settings).run()

    def stream(
        self: CausalLM,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        tokenizer: Any = None,
        skip_special_tokens: bool = True,
        **arguments: Any,
    ) -> Generator[StreamEvent]:
        """Continue one prompt and give each token as it comes, without a thread: an iterator over events.

        An event is `(token, text, finish_reason, scores)`. text: what the token makes certain, never half a character;
        all together are the text of the tokens, "" without a tokenizer. finish_reason: with the last token "eos",
        "stop" (a stop string or criterion) or "length" (of tokens or time), None before. scores: (V,) float32 that the
        token was chosen from, with output_scores=True. A draft's tokens come several a pass, those of beams at the end.

        Leaving the loop, or close(), ends decoding: the model is free, and a cache that was passed holds the prompt and
        the tokens that came, but for the last.

        Args:
            tokenizer: turns tokens into text. skip_special_tokens: leave out special tokens and the end token.
            arguments: as for generate(), a streamer and custom_generate left out; the errors are the same.
        """
        for name in ("streamer", "custom_generate"):
            if arguments.get(name) is not None:
                raise InputError(f"{name} is given to stream(), which is an iterator itself: leave it out.")
        decoding = begin(self, inputs, generation_config, tokenizer=tokenizer, **arguments)
        plan, rows = decoding.plan, decoding.rows
        if rows > 1:
            raise InputError(f"stream follows one row, and this call has {rows}: stream them one at a time.")
        plan.outputs.only_scores(plan.config.output_scores and not decoding.strategy.beams)
        tokens = tokens_of(decoding.steps, plan.outputs, decoding.prompt.cache if decoding.prompt.given else None)
        return events(tokens, tokenizer, skip_special_tokens)

    def stream_rows(
        self: CausalLM,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **arguments: Any,
    ) -> Generator[StepTokens]:
        """Continue prompts as generate() does, with its arguments; gives what each step brings to every row."""
        return begin(self, inputs, generation_config, **arguments).steps

    def generate_batch(
        self: CausalLM,
        prompts: Iterable[batch.Request | Sequence[int] | Tensor],
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> list[batch.BatchResult]:
        """Continue many prompts of any lengths, some at a time; options and results as in `batch.generate_batch`."""
        return batch.generate_batch(self, prompts, generation_config, **options)

    def loop_plan(self: CausalLM) -> str:
        """How a step of greedy decoding or sampling is started, and why, in words, as far as the model decides it."""
        return str(capture.loop_plan(self))

    def free_graphs(self: CausalLM) -> int:
        """Let go of the steps that generate() recorded on the device and of their caches; gives the bytes of these.

        They are kept for later calls of the same shape: at most MAX_CAPTURED, in an eighth of the device's memory.
        """
        store = capture.captured_steps(self)
        with store.lock:
            freed = store.nbytes
            store.clear()
            store.refusal = None
        return freed

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score of each new token, from an output of generate() with output_scores=True.

        Args:
            sequences: (R, P + new) ids. scores: (rows, V) a step. beam_indices: (R, new), of a beam search.
            normalize_logits: turn the scores into log probabilities first (those of a beam search are).

        Returns:
            float32 (R, new); 0 after a row's end. Summed and divided by length ** length_penalty they are the
            sequences_scores of a beam search.
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)


class Decoding:
    """A call that is checked and has not begun; `output` is there once its steps have come to their end."""

    def __init__(self, strategy: Strategy, prompt: Prompt, plan: Plan, steps: Steps[Any]):
        self.strategy, self.prompt, self.plan = strategy, prompt, plan
        self.steps = self._through(steps)
        self.output: Any = None

    @property
    def rows(self) -> int:
        """Results of the call."""
        return len(self.prompt.ids) * self.plan.config.num_return_sequences

    @torch.no_grad()
    def _through(self, steps: Steps[Any]) -> Steps[None]:
        self.output = yield from steps

    def run(self) -> Any:
        with closing(self.steps):
            for _ in self.steps:
                pass
        return self.output


def begin(
    model: CausalLM,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    streamer: Streamer | None = None,
    **given: Any,
) -> Decoding:
    """Check the arguments of generate() and choose the strategy, whose steps return what generate() returns."""
    try:
        with torch.no_grad():
            decoding = _checked(model, inputs, generation_config, streamer, **given)
        if streamer is not None and decoding.rows > 1:
            raise InputError(
                f"a streamer follows one row, and this call has {decoding.rows}: stream them one at a time."
            )
    except BaseException:
        if streamer is not None:
            streamer.end()  # whoever reads it must not wait forever
        raise
    if streamer is not None:
        decoding.steps = told(decoding.steps, streamer, decoding.prompt.ids)
    return decoding


def _checked(
    model: CausalLM,
    inputs: Tensor | None,
    generation_config: GenerationConfig | None,
    streamer: Streamer | None,
    *,
    logits_processor: Iterable[processors.Processor] | None = None,
    stopping_criteria: Iterable[stopping.Criterion] | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Cache | None = None,
    tokenizer: stopping.Decoder | None = None,
    generator: torch.Generator | None = None,
    assistant_model: CausalLM | None = None,
    custom_generate: Callable[..., Any] | None = None,
    prefix_allowed_tokens_fn: AllowedTokens | None = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    **settings: Any,
) -> Decoding:
    if inputs is not None and input_ids is not None:
        raise InputError("inputs and input_ids are the same argument: give one of them.")
    for name, value in {
        "inputs": inputs,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
        "negative_prompt_ids": negative_prompt_ids,
        "negative_prompt_attention_mask": negative_prompt_attention_mask,
    }.items():
        check_tensor(name, value)
    generation_config = _config_of(model, generation_config)
    past_key_values = _cache_of(past_key_values)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a {type(generator).__name__}; give a torch.Generator, or a number as seed=.")
    take_accepted(settings, _ACCEPTED, InputError)
    own = _own_arguments(custom_generate, settings)
    config = generation_config.updated(**settings)
    config.validate(model.config.vocab_size)
    strategy = STRATEGIES[choose(config, assistant_model, streamer, model)]
    ids = inputs if input_ids is None else input_ids
    forgets = custom_generate is None and _forgets(model, config, strategy)
    criteria = _functions("stopping_criteria", stopping_criteria)
    stopping.refuse_clocks(model, config, criteria)
    given = (ids, attention_mask, inputs_embeds, past_key_values)
    prompt, new = prepare(model, config, *given, strategy.tried(config), forgets, position_ids)
    if config.token_healing:
        heal(model, prompt, tokenizer)
    total, vocabulary = prompt.ids.shape[1] + new, model.config.vocab_size
    context = processors.Context(
        config,
        prompt,
        total,
        vocabulary,
        custom=_functions("logits_processor", logits_processor),
        model=model,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        negative_ids=negative_prompt_ids,
        negative_mask=negative_prompt_attention_mask,
        tokenizer=tokenizer,
    )
    noise = Exponential(_generators(config, generator, prompt, strategy))
    plan = Plan(
        processors=processors.build(context),
        pick=sampler(noise) if config.do_sample else greedy,
        pad=config.filler,
        eos=context.eos,
        eos_ids=config.eos_token_ids,
        criteria=stopping.build(config, tokenizer, criteria, vocabulary),
        config=config,
        total=total,
        noise=noise,
        copies=strategy.rows(config),
        assistant=assistant_model,
        outputs=_outputs(config),
    )
    if custom_generate is None:
        steps = _as_asked(strategy.decode(model, prompt, plan), config)
    else:
        steps = _by_custom(custom_generate, model, prompt, plan, own)
    return Decoding(strategy, prompt, plan, steps)


def _config_of(model: CausalLM, config: Any) -> GenerationConfig:
    """The call's settings; what another library's leave open, as transformers' do, is the model's."""
    if config is None or isinstance(config, GenerationConfig):
        return config or model.generation_config
    if not hasattr(config, "to_diff_dict"):
        raise InputError(
            f"generation_config is a {type(config).__name__}; it must be gemmakit's: GenerationConfig(**settings), or "
            "pass the settings themselves."
        )
    given = {name: value for name, value in config.to_diff_dict().items() if name in DEFAULTS and value is not None}
    return model.generation_config.updated(**given)


def _cache_of(past: Any) -> Cache | None:
    found = cache_of(past)
    if past is not None and found is None:
        raise InputError(
            f"past_key_values is a {type(past).__module__}.{type(past).__name__}; give a gemmakit Cache, or "
            "(key, value) of each layer."
        )
    return found


def _functions(name: str, value: Iterable[Callable[..., Any]] | None) -> tuple[Callable[..., Any], ...]:
    """The caller's functions. Raises InputError for one alone, or for what cannot be called."""
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise InputError(f"{name} is a {type(value).__name__}; give a list of functions, [{name}] if it is one.")
    found = tuple(value)
    for each in found:
        if not callable(each):
            raise InputError(f"{name} holds a {type(each).__name__}, which cannot be called: give functions.")
    return found


def _forgets(model: CausalLM, config: GenerationConfig, strategy: Strategy) -> bool:
    """Whether nobody asks the call's cache for what windows hide: its reader, the strategy, or a recorded step."""
    if config.return_dict_in_generate or strategy.looks_back:
        return False
    return not config.cuda_graphs or strategy.beams or bool(capture.loop_plan(model).why)


def _as_asked(steps: Steps[Any], config: GenerationConfig) -> Steps[Any]:
    """What the strategy returns, as generate() gives it."""
    out = yield from steps
    if not config.return_dict_in_generate:
        return out.sequences
    out.past_key_values = out.past_key_values if config.use_cache else None
    return out


def _generators(
    config: GenerationConfig, generator: torch.Generator | None, prompt: Prompt, strategy: Strategy
) -> torch.Generator | list[torch.Generator] | None:
    """What draws: the caller's generator, or with a seed one a row (a search draws for all its beams at once)."""
    if generator is not None and config.seed is not None:
        raise InputError("seed and generator are both given: give one of them.")
    if config.seed is None or not config.do_sample:
        return generator
    padding = torch.zeros_like(prompt.ids, dtype=torch.bool) if prompt.padding is None else prompt.padding
    draws = 1 if strategy.beams else config.num_return_sequences
    rows = [ids[~pads].tolist() for ids, pads in zip(prompt.ids, padding, strict=True) for _ in range(draws)]
    return row_generators(config.seed, rows, prompt.ids.device)


def _own_arguments(custom: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Take from the settings what the caller's own decoding function names and GenerationConfig does not know."""
    if custom is None:
        return {}
    if not callable(custom):
        raise InputError(
            f"custom_generate is {custom!r}: pass a function. A repository's code is never loaded and run; copy the "
            "function out of it if you trust it."
        )
    fields = GenerationConfig.__dataclass_fields__
    own = [n for n in inspect.signature(custom).parameters if n in settings and n not in fields]
    return {name: settings.pop(name) for name in own}


class Ends:
    """All of a plan's ways to end as one criterion, for decoding functions of the caller's own."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self.max_length = plan.total

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """ids: (R, n) -> bool (R,)."""
        return self._plan.ended(ids, scores) | (ids.shape[1] >= self.max_length)


def _by_custom(
    custom: Callable[..., Any], model: CausalLM, prompt: Prompt, plan: Plan, own: dict[str, Any]
) -> Steps[Any]:
    """What the caller's function returns; it brings all its tokens in one step, and does not say how rows ended."""
    out = custom(
        model,
        prompt.ids,
        logits_processor=LogitsProcessorList(plan.processors),
        stopping_criteria=Ends(plan),
        generation_config=plan.config.updated(max_length=plan.total),
        attention_mask=torch.ones_like(prompt.ids) if prompt.mask is None else prompt.mask.long(),
        past_key_values=prompt.cache,
        use_cache=prompt.cache is not None,
        **own,
    )
    sequences = getattr(out, "sequences", out)
    if isinstance(sequences, Tensor) and sequences.dim() == 2:
        new = sequences[:, prompt.ids.shape[1] :].tolist()
        yield StepTokens(new, [None] * len(new))
    return out


def _outputs(config: GenerationConfig) -> StepOutputs:
    def wanted(on: bool) -> list[Any] | None:
        return [] if on and config.return_dict_in_generate else None

    return StepOutputs(
        scores=wanted(config.output_scores),
        logits=wanted(config.output_logits),
        attentions=wanted(config.output_attentions),
        hidden_states=wanted(config.output_hidden_states),
    )
