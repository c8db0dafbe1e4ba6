"""generate(): arguments in, checked and put in order, then the token loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, PromptTooLong, TokenOutOfRange
from gemmakit.generation import GenerationConfig
from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.cache import Cache, DynamicCache, StaticCache
from gemmakit.pytorch.decode import processors, stopping
from gemmakit.pytorch.decode.loop import Plan, Prompt, Recorder, Streamer, decode
from gemmakit.pytorch.decode.sampling import Pick, greedy, row_generators, sampler

DEFAULT_NEW_TOKENS = 20


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
        ids = _ids(self, inputs if input_ids is None else input_ids, inputs_embeds, config)
        mask = _mask(ids, attention_mask, inputs_embeds, past_key_values, config)
        new = _new_tokens(self.config, config, ids, inputs_embeds, mask, past_key_values)
        if config.num_return_sequences > 1:
            ids, mask, inputs_embeds = _repeat(config, past_key_values, ids, mask, inputs_embeds)
        if streamer is not None and ids.shape[0] > 1:
            raise InputError(f"a streamer follows one row, and this call has {ids.shape[0]}: stream them one at a time.")

        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        before = held if mask is None or mask.shape[1] <= ids.shape[1] else 0
        prompt = Prompt(
            ids=ids,
            embeds=inputs_embeds,
            mask=mask if mask is not None and not bool(mask.all()) else None,
            cache=past_key_values if past_key_values is not None else _new_cache(self, config, ids, inputs_embeds, new),
            past=before if held < ids.shape[1] else 0,
        )
        padding = None if prompt.mask is None else ~prompt.mask[:, prompt.mask.shape[1] - ids.shape[1] :]
        eos = torch.tensor(config.eos_token_ids, device=ids.device) if config.eos_token_ids else None
        context = processors.Context(config, eos, ids.shape[1], padding, tuple(logits_processor or ()))
        plan = Plan(
            total=ids.shape[1] + new,
            pick=_pick(config, generator, ids, padding),
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


def _ids(model: Any, ids: Tensor | None, embeds: Tensor | None, config: GenerationConfig) -> Tensor:
    """The prompt's ids (B, P), checked; P is 0 where embeddings stand alone."""
    if embeds is not None:
        ids = torch.empty((embeds.shape[0], 0), dtype=torch.long, device=embeds.device) if ids is None else ids
        if ids.shape[1] not in (0, embeds.shape[1]):
            raise InputError(f"input_ids has {ids.shape[1]} positions and inputs_embeds {embeds.shape[1]}.")
        return ids
    if ids is None or ids.shape[-1] == 0:
        if config.bos_token_id is None or config.bos_token_id < 0:
            raise InputError("there is no prompt and no bos_token_id to start from: give input_ids.")
        rows = 1 if ids is None or ids.dim() < 2 else ids.shape[0]
        return torch.full((rows, 1), config.bos_token_id, dtype=torch.long, device=model.device)
    if ids.dim() != 2 or ids.is_floating_point():
        raise InputError(f"input_ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; give whole numbers (B, P).")
    size = model.config.vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise TokenOutOfRange(
            f"token id {low if low < 0 else high} is outside the vocabulary of {size} ids (0 to {size - 1}): "
            "was the prompt encoded with another model's tokenizer?"
        )
    return ids.to(model.device, torch.long)


def _mask(
    ids: Tensor, mask: Tensor | None, embeds: Tensor | None, cache: Cache | None, config: GenerationConfig
) -> Tensor | None:
    """The visibility of prompt tokens as bool, from the caller or, where that is safe, from the pad token."""
    P = ids.shape[1] if embeds is None else embeds.shape[1]
    if mask is None:
        mask = _inferred(ids, config) if embeds is None and cache is None else None
    if mask is None:
        _check_bos(ids, None, config, cache)
        return None
    if mask.dim() != 2 or mask.shape[0] != ids.shape[0] or mask.shape[1] < P:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be ({ids.shape[0]}, {P}), or wider by what the "
            "cache holds."
        )
    mask = mask.to(ids.device, torch.bool)
    empty = (~mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"row {empty[0]} of the batch is all padding: give it at least the <bos> token.")
    if not bool(mask[:, -1].all()):
        row = int((~mask[:, -1]).nonzero()[0])
        raise InputError(
            f"row {row} is padded on the right, where its new tokens would come: pad on the left "
            '(tokenizer.padding_side = "left").'
        )
    _check_bos(ids, mask, config, cache)
    return mask


def _inferred(ids: Tensor, config: GenerationConfig) -> Tensor | None:
    """A mask when pad tokens form a run at the left of a row and nothing else; None when there are none."""
    pad = config.pad_token_id
    if pad is None or pad in config.eos_token_ids:
        return None
    is_pad = ids == pad
    if not bool(is_pad.any()):
        return None
    if bool(is_pad.all(-1).any()):
        row = int(is_pad.all(-1).nonzero()[0])
        raise InputError(f"row {row} of the batch is all padding: give it at least the <bos> token.")
    if bool((is_pad[:, 1:] & ~is_pad[:, :-1]).any()):
        warnings.warn(
            f"the prompt holds the pad token ({pad}) after other tokens and there is no attention_mask: it is taken as "
            "an ordinary token. Pass attention_mask if it is padding.",
            stacklevel=5,
        )
        return None
    return ~is_pad


def _check_bos(ids: Tensor, mask: Tensor | None, config: GenerationConfig, cache: Cache | None) -> None:
    """Gemma was trained with exactly one <bos> in front; without it, or with two, its text is much worse."""
    bos = config.bos_token_id
    if bos is None or not ids.shape[1] or (cache is not None and cache.get_seq_length()):
        return
    first = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device) if mask is None else mask.int().argmax(-1)
    if mask is not None and mask.shape[1] != ids.shape[1]:
        return
    heads = ids.gather(1, first[:, None]).flatten()
    seconds = ids.gather(1, (first[:, None] + 1).clamp_max(ids.shape[1] - 1)).flatten()
    if not bool((heads == bos).all()):
        warnings.warn("a prompt does not begin with <bos>: Gemma's text is much worse without it.", stacklevel=5)
    elif ids.shape[1] > 1 and bool((seconds == bos).any()):
        warnings.warn("a prompt begins with two <bos> tokens: Gemma was trained with one.", stacklevel=5)


def _new_tokens(
    model: GemmaConfig,
    config: GenerationConfig,
    ids: Tensor,
    embeds: Tensor | None,
    mask: Tensor | None,
    cache: Cache | None,
) -> int:
    """How many tokens may come. Raises PromptTooLong when they do not fit."""
    prompt = ids.shape[1] if embeds is None else embeds.shape[1]
    if mask is not None:
        prompt = max(prompt, mask.shape[1])
    elif cache is not None and cache.get_seq_length() >= ids.shape[1]:
        prompt += cache.get_seq_length()
    context = model.max_position_embeddings
    if config.max_new_tokens is not None:
        new, asked = config.max_new_tokens, f"max_new_tokens is {config.max_new_tokens}"
    elif config.max_length is not None:
        new, asked = config.max_length - prompt, f"max_length is {config.max_length}"
        if new < 1:
            raise PromptTooLong(
                f"prompt has {prompt} tokens and max_length is {config.max_length}, which counts the prompt: "
                "raise max_length, or use max_new_tokens."
            )
    else:
        new = max(1, min(DEFAULT_NEW_TOKENS, context - prompt))
        asked = f"{new} new tokens are asked for"
    longest = prompt if mask is None else int(mask.sum(-1).max())
    if longest + new > context:
        raise PromptTooLong(
            f"prompt has {longest} tokens and {asked}, but the context holds {context}. "
            f"Shorten the prompt, or ask for at most {max(0, context - longest)} new tokens."
        )
    if cache is not None and cache.max_cache_len is not None and prompt + new - 1 > cache.max_cache_len:
        raise PromptTooLong(
            f"prompt has {prompt} tokens and {asked}, but the cache holds {cache.max_cache_len}. "
            f"Shorten the prompt or make the cache with max_cache_len={prompt + new}."
        )
    return new


def _repeat(
    config: GenerationConfig, cache: Cache | None, ids: Tensor, mask: Tensor | None, embeds: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    n = config.num_return_sequences
    if not config.do_sample:
        raise InputError(f"num_return_sequences is {n}, but greedy decoding has one result a prompt: set do_sample=True.")
    if cache is not None:
        cache.batch_repeat_interleave(n)
    repeated = (None if x is None else x.repeat_interleave(n, dim=0) for x in (ids, mask, embeds))
    return tuple(repeated)  # type: ignore[return-value]


def _new_cache(model: Any, config: GenerationConfig, ids: Tensor, embeds: Tensor | None, new: int) -> Cache | None:
    if config.cache_implementation == "static":
        length = (ids.shape[1] if embeds is None else embeds.shape[1]) + new
        return StaticCache(model.config, max_cache_len=length)
    # Embeddings cannot be run again from ids, so they always need a cache.
    return DynamicCache() if config.use_cache or embeds is not None else None


def _pick(config: GenerationConfig, generator: torch.Generator | None, ids: Tensor, padding: Tensor | None) -> Pick:
    if not config.do_sample:
        return greedy
    if generator is not None and config.seed is not None:
        raise InputError("seed and generator are both given: give one of them.")
    if config.seed is None:
        return sampler(generator)
    prompts: Sequence[Sequence[int]] = ids.tolist()
    if padding is not None:
        prompts = [[t for t, p in zip(row, pads, strict=True) if not p] for row, pads in zip(prompts, padding.tolist(), strict=True)]
    return sampler(row_generators(config.seed, prompts, ids.device))


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
