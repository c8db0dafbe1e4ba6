"""generate(): arguments in, checked and put in order, then the token loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.cache import Cache
from gemmakit.pytorch.decode import processors, stopping
from gemmakit.pytorch.decode.loop import Plan, Recorder, Streamer, decode
from gemmakit.pytorch.decode.prompt import Prompt, prepare
from gemmakit.pytorch.decode.sampling import Pick, greedy, row_generators, sampler


class GenerationMixin:
    """Gives a causal language model its generate()."""

    config: GemmaConfig
    generation_config: GenerationConfig

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[processors.Processor] | None = None,
        stopping_criteria: Iterable[stopping.Criterion] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        streamer: Streamer | None = None,
        tokenizer: stopping.Decoder | None = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue the prompts.

        Args:
            inputs, input_ids: (B, P) prompt ids, padded on the left if they differ in length; without any prompt each
                row starts from <bos>.
            attention_mask: (B, P), 0 on padding; inferred when the ids begin with the pad token.
            inputs_embeds: (B, P, D) instead of ids; the result then holds the new tokens only.
            past_key_values: a cache that already holds the beginning of the ids, or what precedes them.
            generation_config: instead of the model's own settings.
            settings: any field of GenerationConfig, for this call.
            logits_processor: more processors, called as f(ids (B, n), scores (B, V)) -> scores.
            stopping_criteria: called as f(ids, scores) -> bool (B,) or bool.
            streamer: told of every token as it comes (one row only).
            tokenizer: needed for stop_strings.
            generator: draws the samples; `seed=` makes one a row instead.

        Returns:
            (B * num_return_sequences, P + new) ids; or GenerateDecoderOnlyOutput with return_dict_in_generate=True.

        Raises:
            GenerationConfigError, InputError, TokenOutOfRange: an argument out of range.
            PromptTooLong: prompt and new tokens do not fit the context or the cache.
            NumericalError: a step has no finite score to choose by.
        """
        if inputs is not None and input_ids is not None:
            raise InputError("inputs and input_ids are the same argument: give one of them.")
        config = (generation_config or self.generation_config).updated(**settings)
        config.validate(self.config.vocab_size)
        ids = inputs if input_ids is None else input_ids
        prompt, new = prepare(self, config, ids, attention_mask, inputs_embeds, past_key_values)
        rows, length = prompt.ids.shape
        if streamer is not None and rows > 1:
            raise InputError(f"a streamer follows one row, and this call has {rows}: stream them one at a time.")
        eos = torch.tensor(config.eos_token_ids, device=prompt.ids.device) if config.eos_token_ids else None
        context = processors.Context(config, eos, length, prompt.padding, tuple(logits_processor or ()))
        plan = Plan(
            total=length + new,
            pick=_pick(config, generator, prompt),
            processors=processors.build(context),
            criteria=stopping.build(config, tokenizer, tuple(stopping_criteria or ())),
            eos=eos,
            pad=_pad(config),
            streamer=streamer,
            chunk=config.prefill_chunk_size,
            record=_recorder(config),
        )
        out = decode(self, prompt, plan)
        if config.return_dict_in_generate:
            out.past_key_values = out.past_key_values if config.use_cache else None
            return out
        return out.sequences


def _pick(config: GenerationConfig, generator: torch.Generator | None, prompt: Prompt) -> Pick:
    if not config.do_sample:
        return greedy
    if generator is not None and config.seed is not None:
        raise InputError("seed and generator are both given: give one of them.")
    if config.seed is None:
        return sampler(generator)
    padding = torch.zeros_like(prompt.ids, dtype=torch.bool) if prompt.padding is None else prompt.padding
    rows = [ids[~pads].tolist() for ids, pads in zip(prompt.ids, padding, strict=True)]
    return sampler(row_generators(config.seed, rows, prompt.ids.device))


def _pad(config: GenerationConfig) -> int:
    """What fills rows that end before the others."""
    if config.pad_token_id is not None and config.pad_token_id >= 0:
        return config.pad_token_id
    return config.eos_token_ids[0] if config.eos_token_ids else 0


def _recorder(config: GenerationConfig) -> Recorder:
    def wanted(on: bool) -> list[Any] | None:
        return [] if on and config.return_dict_in_generate else None

    return Recorder(
        scores=wanted(config.output_scores),
        logits=wanted(config.output_logits),
        attentions=wanted(config.output_attentions),
        hidden_states=wanted(config.output_hidden_states),
    )
