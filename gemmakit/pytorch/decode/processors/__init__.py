"""Which processors the settings ask for, in the order in which they change a step's logits.

To add one: write it in `logits`, give it its place in `PROCESSORS`, and its setting to GenerationConfig.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.processors import watermark
from gemmakit.pytorch.decode.processors.grammar import grammar_constraint
from gemmakit.pytorch.decode.processors.guidance import Guidance
from gemmakit.pytorch.decode.processors.logits import (
    FORBIDDEN,
    AllowedTokens,
    EncoderNoRepeatNgram,
    EncoderRepetitionPenalty,
    EpsilonCutoff,
    EtaCutoff,
    ExponentialDecayLengthPenalty,
    ForcedTokens,
    MinLength,
    MinP,
    NoRepeatNgram,
    PrefixAllowedTokens,
    RemoveInvalidValues,
    RenormalizeLogits,
    RepetitionPenalty,
    ScoresOnly,
    SequenceBias,
    SuppressTokens,
    Temperature,
    TopH,
    TopK,
    TopP,
    TypicalP,
    bad_words,
    seen,
)
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.protocols import CausalLM, Processor
from gemmakit.pytorch.decode.token_bytes import Tokenizer

__all__ = ["FORBIDDEN", "PROCESSORS", "AllowedTokens", "Context", "Processor", "ScoresOnly", "build", "repeatable"]


@dataclass(frozen=True)
class Context:
    """What processors may need to know beside their setting.

    total: the tokens a row may have, prompt included. vocabulary: V. model: whom guidance asks again; negative_ids
    (B or 1, N) and negative_mask are its other prompt. tokenizer: for a grammar.
    """

    config: GenerationConfig
    prompt: Prompt
    total: int
    vocabulary: int
    custom: tuple[Processor, ...] = ()
    model: CausalLM | None = None
    prefix_allowed_tokens_fn: AllowedTokens | None = None
    negative_ids: Tensor | None = None
    negative_mask: Tensor | None = None
    tokenizer: Tokenizer | None = None

    @cached_property
    def eos(self) -> Tensor | None:
        """(E,) ids, None if no token ends a row."""
        return self.ids(self.config.eos_token_ids) if self.config.eos_token_ids else None

    @property
    def prompt_length(self) -> int:
        return self.prompt.ids.shape[1]

    @property
    def unseen(self) -> int:
        """Positions of the prompt that are embeddings, of which ids say nothing."""
        return 0 if self.prompt.embeds is None else self.prompt.embeds.shape[1] - self.prompt_length

    @property
    def keep(self) -> int:
        """Tokens that truncation leaves: a beam needs one beside every eos, to go on."""
        if self.config.num_beams == 1:
            return 1
        return 2 if self.eos is None else self.eos.numel() + 1

    def ids(self, tokens: int | Sequence[int]) -> Tensor:
        listed = [tokens] if isinstance(tokens, int) else list(tokens)
        return torch.tensor(listed, dtype=torch.long, device=self.prompt.ids.device)

    def known_prompt(self, setting: str) -> Tensor | None:
        """(B, P) ids with NOTHING on padding; None, and a warning, where embeddings stand alone."""
        if self.prompt_length:
            return seen(self.prompt.ids, self.prompt.padding)
        warnings.warn(f"{setting} reads the prompt's ids, and there are none: it does nothing.", stacklevel=7)
        return None

    def warn_if_unseen(self, setting: str) -> None:
        if self.unseen:
            warnings.warn(f"{setting} sees the new tokens alone: the prompt is embeddings.", stacklevel=7)


def build(context: Context) -> list[Processor]:
    """The processors that the settings ask for, in order."""
    chain: list[Processor] = []
    for make in PROCESSORS.values():
        made = make(context)
        if made is not None:
            chain.extend(made if isinstance(made, tuple) else (made,))
    return chain


def repeatable(processor: Processor) -> bool:
    """Whether it may be asked of tokens that do not come, in place of those that do, and nobody notices."""
    own = type(processor).__module__.startswith(f"{__name__}.")
    return own and not isinstance(processor, Guidance | PrefixAllowedTokens)


Builder = Callable[[Context], "Processor | tuple[Processor, ...] | None"]


def _sampling(setting: str, off: Any, make: Callable[[Any, int], Processor]) -> Builder:
    """For what shapes sampling alone: made of the setting's value and how many tokens to leave, unless it is `off`."""

    def build(c: Context) -> Processor | None:
        value = getattr(c.config, setting)
        return make(value, c.keep) if c.config.do_sample and value != off else None

    return build


def _guidance(c: Context) -> Processor | None:
    scale = c.config.guidance_scale
    if scale is None or scale == 1:
        if c.negative_ids is not None:
            raise InputError("negative_prompt_ids is given without guidance_scale: set it, for instance to 1.5.")
        return None
    ids = c.prompt.ids[:, -1:] if c.negative_ids is None else c.negative_ids
    if not ids.shape[1]:
        raise InputError("guidance needs a prompt of ids to start from: pass negative_prompt_ids.")
    # Beams change places between steps, which a cache would have to follow: they are computed anew.
    assert c.model is not None
    cached = c.config.use_cache and c.config.num_beams == 1
    return Guidance(scale, c.model, ids, c.negative_mask, c.prompt_length, cached)


def _bias(c: Context) -> Processor | None:
    if not c.config.biases:
        return None
    return SequenceBias.of(c.config.biases, c.vocabulary, c.prompt.padding, c.prompt.ids.device)


def _bad_words(c: Context) -> Processor | None:
    biases = bad_words(c.config.bad_words_ids or (), c.config.eos_token_ids)
    return SequenceBias.of(biases, c.vocabulary, c.prompt.padding, c.prompt.ids.device) if biases else None


def _repetition(c: Context) -> Processor | None:
    penalty = c.config.repetition_penalty
    if penalty == 1.0:
        return None
    c.warn_if_unseen("repetition_penalty")
    return RepetitionPenalty(penalty, c.prompt.padding)


def _prompt_bonus(c: Context) -> Processor | None:
    penalty = c.config.encoder_repetition_penalty
    prompt = None if penalty == 1.0 else c.known_prompt("encoder_repetition_penalty")
    return None if prompt is None else EncoderRepetitionPenalty(penalty, prompt)


def _no_ngram(c: Context) -> Processor | None:
    size = c.config.no_repeat_ngram_size
    if not size:
        return None
    c.warn_if_unseen("no_repeat_ngram_size")
    return NoRepeatNgram(size, c.prompt.padding)


def _no_prompt_ngram(c: Context) -> Processor | None:
    size = c.config.encoder_no_repeat_ngram_size
    prompt = None if not size else c.known_prompt("encoder_no_repeat_ngram_size")
    return None if prompt is None else EncoderNoRepeatNgram(size, prompt)


def _min_length(c: Context) -> Processor | None:
    if c.config.min_new_tokens is not None:
        return None
    wanted = c.config.min_length - c.unseen
    return MinLength(wanted, c.eos) if c.eos is not None and wanted > 0 else None


def _min_new_tokens(c: Context) -> Processor | None:
    wanted = c.config.min_new_tokens
    return MinLength(c.prompt_length + wanted, c.eos) if c.eos is not None and wanted else None


def _prefix(c: Context) -> Processor | None:
    if c.prefix_allowed_tokens_fn is None:
        return None
    return PrefixAllowedTokens(c.prefix_allowed_tokens_fn, c.config.num_beams // c.config.num_beam_groups)


def _forced_bos(c: Context) -> Processor | None:
    token = c.config.forced_bos_token_id
    return None if token is None else ForcedTokens(1, c.ids(token))


def _forced_eos(c: Context) -> Processor | None:
    tokens = c.config.forced_eos_token_id
    return None if tokens is None else ForcedTokens(c.total - 1, c.ids(tokens))


def _decay(c: Context) -> Processor | None:
    if c.config.exponential_decay_length_penalty is None or c.eos is None:
        return None
    start, factor = c.config.exponential_decay_length_penalty
    return ExponentialDecayLengthPenalty(c.prompt_length + start, factor, c.eos)


def _suppressed(c: Context) -> Processor | None:
    tokens = c.config.suppress_tokens
    return SuppressTokens(c.ids(tokens)) if tokens else None


def _suppressed_first(c: Context) -> Processor | None:
    tokens = c.config.begin_suppress_tokens
    if not tokens:
        return None
    # A forced first token is followed by the first that is chosen.
    forced = c.prompt_length <= 1 and c.config.forced_bos_token_id is not None
    return SuppressTokens(c.ids(tokens), c.prompt_length + forced)


def _watermark(c: Context) -> Processor | None:
    settings = c.config.watermark
    return None if settings is None else watermark.processor(settings, c.vocabulary, c.prompt_length, c.prompt.padding)


# The order is that of transformers, which has no "constraint". Those before "custom" shape every strategy; those after
# it sampling alone, but for the last two.
PROCESSORS: dict[str, Builder] = {
    "guidance_scale": _guidance,
    "sequence_bias": _bias,
    "encoder_repetition_penalty": _prompt_bonus,
    "repetition_penalty": _repetition,
    "no_repeat_ngram_size": _no_ngram,
    "encoder_no_repeat_ngram_size": _no_prompt_ngram,
    "bad_words_ids": _bad_words,
    "min_length": _min_length,
    "min_new_tokens": _min_new_tokens,
    "prefix_allowed_tokens_fn": _prefix,
    "forced_bos_token_id": _forced_bos,
    "forced_eos_token_id": _forced_eos,
    "remove_invalid_values": lambda c: RemoveInvalidValues() if c.config.remove_invalid_values else None,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _suppressed,
    "begin_suppress_tokens": _suppressed_first,
    "constraint": lambda c: grammar_constraint(c.config, c.tokenizer, c.vocabulary, c.prompt_length),
    "custom": lambda c: c.custom,
    "temperature": _sampling("temperature", 1.0, lambda value, _: Temperature(value)),
    "top_h": _sampling("top_h", None, lambda value, _: TopH(value)),
    "top_k": _sampling("top_k", 0, TopK),
    "top_p": _sampling("top_p", 1.0, TopP),
    "min_p": _sampling("min_p", None, MinP),
    "typical_p": _sampling("typical_p", 1.0, TypicalP),
    "epsilon_cutoff": _sampling("epsilon_cutoff", 0.0, EpsilonCutoff),
    "eta_cutoff": _sampling("eta_cutoff", 0.0, EtaCutoff),
    "watermarking_config": _watermark,
    "renormalize_logits": lambda c: RenormalizeLogits() if c.config.renormalize_logits else None,
}
