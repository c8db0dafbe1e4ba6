"""Names of transformers' for what gemmakit has under its own: `from gemmakit import TopKLogitsWarper` finds them here.

Processors and criteria take transformers' arguments and are gemmakit's underneath; to generate() the settings of the
same meaning do the same. Axis letters: B rows, n tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemmakit.auto import AutoModelForCausalLM
from gemmakit.checks import Whole, check
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.generation.constraints import Constraint
from gemmakit.generation.settings import check_filter_value, in_range
from gemmakit.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, ModelOutput
from gemmakit.pytorch.decode.processors import logits, watermark
from gemmakit.pytorch.decode.processors.guidance import Guidance
from gemmakit.pytorch.decode.protocols import LogitsProcessor, Processor, StoppingCriteria
from gemmakit.pytorch.decode.stopping import MaxTime, StopStrings
from gemmakit.pytorch.decode.strategies.scorer import BeamSearchScorer
from gemmakit.pytorch.decode.token_bytes import token_table
from gemmakit.pytorch.pretrained import GemmaPreTrainedModel
from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast
from gemmakit.text.vocabulary import AddedToken

PreTrainedModel = GemmaPreTrainedModel
PretrainedConfig = PreTrainedConfig = GemmaConfig
PreTrainedTokenizer = GemmaTokenizer
PreTrainedTokenizerFast = TokenizersBackend = GemmaTokenizerFast

Ids = int | Sequence[int] | Tensor
# Given the ids and scores of a step, what processes them: tensors are made where these are.
Made = Callable[[Tensor, Tensor], Processor]


class AggregationStrategy(str, Enum):
    """What `aggregation_strategy` of token classification may be."""

    NONE = "none"
    SIMPLE = "simple"
    FIRST = "first"
    AVERAGE = "average"
    MAX = "max"


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch. deterministic: refuse torch's algorithms that are not. JAX has keys instead."""
    check("seed", seed, Whole(0, 2**32 - 1), InputError)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


# -- processors --------------------------------------------------------------------------------------------------------


def _on(value: Ids, like: Tensor) -> Tensor:
    """Token ids, (E,), where `like` is."""
    listed = [value] if isinstance(value, int) else value
    return torch.as_tensor(listed, dtype=torch.long, device=like.device).flatten()


def _processor(name: str, make: Callable[..., Made]) -> Any:
    """A class called `name` whose arguments are those of `make`."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        self._make, self._made = make(*args, **kwargs), {}

    def call(self: Any, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, n); scores: (B, V) -> (B, V)."""
        where = scores.device, scores.shape[-1]
        if where not in self._made:
            self._made[where] = self._make(input_ids, scores)
        return self._made[where](input_ids, scores)

    given = inspect.signature(make, eval_str=False)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    init.__signature__ = given.replace(parameters=[own, *given.parameters.values()])  # type: ignore[attr-defined]
    own_names = {"__init__": init, "__call__": call, "__doc__": make.__doc__, "__module__": __name__}
    return type(name, (LogitsProcessor,), own_names)


def _min_length(min_length: int, eos_token_id: Ids, device: Any = None) -> Made:
    """No eos before `min_length` tokens, prompt included."""
    in_range("min_length", min_length)
    return lambda ids, scores: logits.MinLength(min_length, _on(eos_token_id, scores))


def _min_new(prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: Ids, device: Any = None) -> Made:
    """No eos before `min_new_tokens` tokens after the prompt."""
    in_range("min_new_tokens", min_new_tokens)
    length = prompt_length_to_skip + min_new_tokens
    return lambda ids, scores: logits.MinLength(length, _on(eos_token_id, scores))


def _temperature(temperature: float) -> Made:
    """Logits divided by the temperature."""
    made = logits.Temperature(in_range("temperature", temperature))
    return lambda ids, scores: made


def _repetition(penalty: float, prompt_ignore_length: int | None = None) -> Made:
    """Tokens that are there get less likely. prompt_ignore_length: how many of the first do not count."""
    in_range("repetition_penalty", penalty)

    def made(ids: Tensor, scores: Tensor) -> Processor:
        ignored = torch.ones((1, prompt_ignore_length or 0), dtype=torch.bool, device=ids.device)
        return logits.RepetitionPenalty(penalty, ignored if prompt_ignore_length else None)

    return made


def _encoder_repetition(penalty: float, encoder_input_ids: Tensor) -> Made:
    """Tokens of the prompt (B, P) get likelier."""
    in_range("encoder_repetition_penalty", penalty)
    return lambda ids, scores: logits.EncoderRepetitionPenalty(penalty, encoder_input_ids.to(ids.device))


def _shaping(setting: str, argument: str, kind: Callable[[Any, int], Processor], doc: str) -> Callable[..., Made]:
    """For what takes (argument, filter_value, min_tokens_to_keep)."""
    names = (argument, "filter_value", "min_tokens_to_keep")
    parameter, absent = inspect.Parameter, inspect.Parameter.empty
    given = zip(names, (absent, logits.FORBIDDEN, 1), strict=True)
    signature = inspect.Signature([parameter(n, parameter.POSITIONAL_OR_KEYWORD, default=d) for n, d in given])

    def make(*args: Any, **named: Any) -> Made:
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        value, filler, keep = bound.args
        in_range(setting, value)
        check_filter_value(filler)
        check("min_tokens_to_keep", keep, Whole(1), InputError)
        made = kind(value, keep)
        return lambda ids, scores: made

    make.__doc__, make.__signature__ = doc, signature  # type: ignore[attr-defined]
    return make


def _no_ngram(ngram_size: int) -> Made:
    """No n-gram of this size comes twice."""
    check("ngram_size", ngram_size, Whole(1), InputError)
    made = logits.NoRepeatNgram(ngram_size, None)
    return lambda ids, scores: made


def _no_encoder_ngram(encoder_ngram_size: int, encoder_input_ids: Tensor) -> Made:
    """No n-gram of the prompt (B, P) comes again."""
    check("encoder_ngram_size", encoder_ngram_size, Whole(1), InputError)
    prompt = encoder_input_ids if encoder_input_ids.dim() == 2 else encoder_input_ids[None]
    return lambda ids, scores: logits.EncoderNoRepeatNgram(encoder_ngram_size, prompt.to(ids.device))


def _bias(sequence_bias: Any) -> Made:
    """{(ids): added to the last one's logit}."""
    pairs = sequence_bias.items() if isinstance(sequence_bias, dict) else sequence_bias
    biases = {tuple(ids): float(bias) for ids, bias in pairs}
    return lambda ids, scores: logits.SequenceBias.of(biases, scores.shape[-1], None, scores.device)


def _bad_words(bad_words_ids: list[list[int]], eos_token_id: Ids | None = None) -> Made:
    """Sequences that do not come; a lone eos stays allowed."""
    in_range("bad_words_ids", bad_words_ids)
    ends = [] if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()
    biases = logits.bad_words(bad_words_ids, ends)
    return lambda ids, scores: logits.SequenceBias.of(biases, scores.shape[-1], None, scores.device)


def _prefix(prefix_allowed_tokens_fn: logits.AllowedTokens, num_beams: int) -> Made:
    """Only what the function allows: (prompt's number, ids so far) -> ids."""
    made = logits.PrefixAllowedTokens(prefix_allowed_tokens_fn, num_beams)
    return lambda ids, scores: made


def _forced_bos(bos_token_id: int) -> Made:
    """The token that follows the first."""
    return lambda ids, scores: logits.ForcedTokens(1, _on(bos_token_id, scores))


def _forced_eos(max_length: int, eos_token_id: Ids, device: Any = None) -> Made:
    """The last of `max_length` tokens is one of these."""
    return lambda ids, scores: logits.ForcedTokens(max_length - 1, _on(eos_token_id, scores))


def _remove_invalid() -> Made:
    """NaN and infinities become finite."""
    made = logits.RemoveInvalidValues()
    return lambda ids, scores: made


def _decay(exponential_decay_length_penalty: tuple[int, float], eos_token_id: Ids, input_ids_seq_length: int) -> Made:
    """eos gets likelier after so many new tokens, by this factor."""
    start, factor = exponential_decay_length_penalty
    start += input_ids_seq_length
    return lambda ids, scores: logits.ExponentialDecayLengthPenalty(start, factor, _on(eos_token_id, scores))


def _normalized() -> Made:
    """Scores become log probabilities."""
    made = logits.RenormalizeLogits()
    return lambda ids, scores: made


def _suppressed(suppress_tokens: Ids, device: Any = None) -> Made:
    """Tokens that never come."""
    return lambda ids, scores: logits.SuppressTokens(_on(suppress_tokens, scores))


def _suppressed_first(begin_suppress_tokens: Ids, begin_index: int, device: Any = None) -> Made:
    """Tokens that do not come when there are `begin_index`."""
    return lambda ids, scores: logits.SuppressTokens(_on(begin_suppress_tokens, scores), begin_index)


def _guidance(
    guidance_scale: float,
    model: Any,
    unconditional_ids: Tensor | None = None,
    unconditional_attention_mask: Tensor | None = None,
    use_cache: bool = True,
) -> Made:
    """Away from what the model says after another prompt, (B or 1, N); by default after the last token alone."""

    def made(ids: Tensor, scores: Tensor) -> Processor:
        negative = ids[:, -1:] if unconditional_ids is None else unconditional_ids
        return Guidance(guidance_scale, model, negative, unconditional_attention_mask, ids.shape[1], use_cache)

    return made


MinLengthLogitsProcessor = _processor("MinLengthLogitsProcessor", _min_length)
MinNewTokensLengthLogitsProcessor = _processor("MinNewTokensLengthLogitsProcessor", _min_new)
TemperatureLogitsWarper = _processor("TemperatureLogitsWarper", _temperature)
RepetitionPenaltyLogitsProcessor = _processor("RepetitionPenaltyLogitsProcessor", _repetition)
EncoderRepetitionPenaltyLogitsProcessor = _processor("EncoderRepetitionPenaltyLogitsProcessor", _encoder_repetition)
TopKLogitsWarper = _processor(
    "TopKLogitsWarper", _shaping("top_k", "top_k", lambda k, keep: logits.TopK(max(k, keep), keep), "The likeliest k.")
)
TopPLogitsWarper = _processor(
    "TopPLogitsWarper", _shaping("top_p", "top_p", logits.TopP, "The likeliest tokens that make up the share p.")
)
MinPLogitsWarper = _processor(
    "MinPLogitsWarper",
    _shaping("min_p", "min_p", logits.MinP, "Tokens with this share of the likeliest."),
)
TopHLogitsWarper = _processor(
    "TopHLogitsWarper", _shaping("top_h", "top_h", lambda h, _: logits.TopH(h), "This share of the entropy.")
)
TypicalLogitsWarper = _processor(
    "TypicalLogitsWarper", _shaping("typical_p", "mass", logits.TypicalP, "The most typical tokens.")
)
EpsilonLogitsWarper = _processor(
    "EpsilonLogitsWarper", _shaping("epsilon_cutoff", "epsilon", logits.EpsilonCutoff, "Tokens above a probability.")
)
EtaLogitsWarper = _processor(
    "EtaLogitsWarper", _shaping("eta_cutoff", "epsilon", logits.EtaCutoff, "Tokens above a floor by the entropy.")
)
NoRepeatNGramLogitsProcessor = _processor("NoRepeatNGramLogitsProcessor", _no_ngram)
EncoderNoRepeatNGramLogitsProcessor = _processor("EncoderNoRepeatNGramLogitsProcessor", _no_encoder_ngram)
SequenceBiasLogitsProcessor = _processor("SequenceBiasLogitsProcessor", _bias)
NoBadWordsLogitsProcessor = _processor("NoBadWordsLogitsProcessor", _bad_words)
PrefixConstrainedLogitsProcessor = _processor("PrefixConstrainedLogitsProcessor", _prefix)
ForcedBOSTokenLogitsProcessor = _processor("ForcedBOSTokenLogitsProcessor", _forced_bos)
ForcedEOSTokenLogitsProcessor = _processor("ForcedEOSTokenLogitsProcessor", _forced_eos)
InfNanRemoveLogitsProcessor = _processor("InfNanRemoveLogitsProcessor", _remove_invalid)
ExponentialDecayLengthPenalty = _processor("ExponentialDecayLengthPenalty", _decay)
LogitNormalization = _processor("LogitNormalization", _normalized)
SuppressTokensLogitsProcessor = _processor("SuppressTokensLogitsProcessor", _suppressed)
SuppressTokensAtBeginLogitsProcessor = _processor("SuppressTokensAtBeginLogitsProcessor", _suppressed_first)
UnbatchedClassifierFreeGuidanceLogitsProcessor = _processor("UnbatchedClassifierFreeGuidanceLogitsProcessor", _guidance)
WatermarkLogitsProcessor, SynthIDTextWatermarkLogitsProcessor = watermark.GreenList, watermark.SynthID


# -- criteria ----------------------------------------------------------------------------------------------------------


class MaxLengthCriteria(StoppingCriteria):
    """A row ends with `max_length` tokens, prompt included."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None):
        self.max_length, self.max_position_embeddings = max_length, max_position_embeddings

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """input_ids: (B, n) -> bool (B,)."""
        done = input_ids.shape[1] >= self.max_length
        return torch.full((len(input_ids),), done, device=input_ids.device)


class MaxTimeCriteria(StoppingCriteria):
    """Rows end after `max_time` seconds since `initial_timestamp` (time.time()), or since this was made."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None):
        self.max_time = max_time
        begun = time.monotonic() if initial_timestamp is None else time.monotonic() - time.time() + initial_timestamp
        self._time = MaxTime(max_time, begun)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """input_ids: (B, n) -> bool (B,)."""
        return torch.full((len(input_ids),), self._time(input_ids, scores), device=input_ids.device)


class EosTokenCriteria(StoppingCriteria):
    """A row ends with one of these tokens."""

    def __init__(self, eos_token_id: Ids):
        self.eos_token_id = _on(eos_token_id, torch.empty(0))

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """input_ids: (B, n) -> bool (B,)."""
        return torch.isin(input_ids[:, -1], self.eos_token_id.to(input_ids.device))


class StopStringCriteria(StoppingCriteria):
    """A row ends when its last token completes one of the texts."""

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]):
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        table, _ = token_table(tokenizer, max(tokenizer.get_vocab().values()) + 1)
        self._stop = StopStrings([text.encode() for text in self.stop_strings], table)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """input_ids: (B, n) -> bool (B,)."""
        return self._stop(input_ids, scores)


__all__ = [
    "AddedToken",
    "AutoModelForCausalLM",
    "BeamSearchScorer",
    "Constraint",
    "GenerateBeamDecoderOnlyOutput",
    "GenerateDecoderOnlyOutput",
    "ModelOutput",
    *(name for name, value in list(globals().items()) if inspect.isclass(value) and value.__module__ == __name__),
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "PretrainedConfig",
    "SynthIDTextWatermarkLogitsProcessor",
    "TokenizersBackend",
    "WatermarkLogitsProcessor",
    "set_seed",
]
