"""The range of every generation setting, as data, and the one check that reads it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gemmakit.errors import GenerationConfigError, TokenOutOfRange


def is_whole(value: Any) -> bool:
    """Python's and numpy's integers; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number no float can hold
        return False


@dataclass(frozen=True)
class Whole:
    """A whole number in low..high."""

    low: int
    high: float = math.inf

    def holds(self, value: Any) -> bool:
        return is_whole(value) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number >= {self.low}" + ("" if self.high == math.inf else f" and <= {self.high:g}")


@dataclass(frozen=True)
class Real:
    """A finite number between low and high; `above` and `below` exclude the limit itself."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    remedy: str = ""

    def holds(self, value: Any) -> bool:
        if not is_finite(value):
            return False
        enough = value > self.low if self.above else value >= self.low
        return enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f" {'>' if self.above else '>='} {self.low:g}"
        high = "" if self.high == math.inf else f" {'<' if self.below else '<='} {self.high:g}"
        return f"a finite number{low}{' and' if low and high else ''}{high}{self.remedy}"


@dataclass(frozen=True)
class OneOf:
    """One of a few values."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        return any(value is v or (isinstance(v, str) and value == v) for v in self.values)

    def __str__(self) -> str:
        return f"one of {', '.join(repr(v) for v in self.values)}"


@dataclass(frozen=True)
class Kind:
    """A value of a Python type, not empty."""

    types: tuple[type, ...]
    said: str

    def holds(self, value: Any) -> bool:
        return isinstance(value, self.types) and (isinstance(value, bool) or bool(value))

    def __str__(self) -> str:
        return self.said


FLAG = OneOf((True, False))
_TEXT = Kind((str,), "a text of at least 1 character")
_SHARE = Real(0, 1)
_CUTOFF = Real(0, 1, below=True)
_FACTOR = Real(0, above=True)

CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")
SCHEDULES = ("constant", "heuristic", "heuristic_transient")

# A field whose default is None may be None; for the others None means the default.
RANGES: dict[str, Whole | Real | OneOf | Kind] = {
    "max_length": Whole(1),
    "max_new_tokens": Whole(1),
    "min_length": Whole(0),
    "min_new_tokens": Whole(0),
    "max_time": Real(0, above=True),
    "early_stopping": OneOf((True, False, "never")),
    "do_sample": FLAG,
    "num_beams": Whole(1),
    "num_beam_groups": Whole(1),
    "diversity_penalty": Real(0),
    "length_penalty": Real(),
    "penalty_alpha": _SHARE,
    "low_memory": FLAG,
    "constraints": Kind((list, tuple), "a list of at least 1 constraint"),
    "use_cache": FLAG,
    "cache_implementation": OneOf(CACHES),
    "cache_config": Kind((dict,), "a dictionary of the cache's own arguments"),
    "max_cache_len": Whole(1),
    "prefill_chunk_size": Whole(1),
    "cuda_graphs": FLAG,
    "temperature": Real(0, above=True, remedy="; for the likeliest token always, set do_sample=False"),
    "top_k": Whole(0),
    "top_p": _SHARE,
    "min_p": _SHARE,
    "top_h": Real(0, 1, above=True),
    "typical_p": Real(0, 1, above=True),
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "seed": Whole(0, 2**63 - 1),
    "repetition_penalty": _FACTOR,
    "encoder_repetition_penalty": _FACTOR,
    "no_repeat_ngram_size": Whole(0),
    "encoder_no_repeat_ngram_size": Whole(0),
    "renormalize_logits": FLAG,
    "remove_invalid_values": FLAG,
    "token_healing": FLAG,
    "guidance_scale": Real(),
    "json_schema": Kind((dict, str, bool), "a JSON schema: a dictionary, its text, or true"),
    "regex": _TEXT,
    "grammar": _TEXT,
    "is_assistant": FLAG,
    "num_assistant_tokens": Whole(1),
    "num_assistant_tokens_schedule": OneOf(SCHEDULES),
    "assistant_confidence_threshold": _SHARE,
    "prompt_lookup_num_tokens": Whole(1),
    "max_matching_ngram_size": Whole(1),
    "num_return_sequences": Whole(1),
    "return_dict_in_generate": FLAG,
    "output_scores": FLAG,
    "output_logits": FLAG,
    "output_attentions": FLAG,
    "output_hidden_states": FLAG,
}

# Fields that hold token ids, and how deep the lists around them may be.
TOKENS: dict[str, tuple[int, ...]] = {
    "pad_token_id": (0,),
    "bos_token_id": (0,),
    "eos_token_id": (0, 1),
    "forced_bos_token_id": (0,),
    "forced_eos_token_id": (0, 1),
    "suppress_tokens": (1,),
    "begin_suppress_tokens": (1,),
    "bad_words_ids": (2,),
    "force_words_ids": (2, 3),
}
_SHAPES = ("a token id", "a list of token ids", "a list of lists of token ids", "lists of lists of lists of token ids")
# Released files write -1 for "no such token".
_ABSENT = ("pad_token_id", "bos_token_id", "eos_token_id")

# Settings of transformers that Gemma, or this library, has no use for: a call that gives one is told why.
REFUSED: dict[str, str] = {
    "decoder_start_token_id": "Gemma has no encoder; a decoder-only prompt starts with bos_token_id",
    "dola_layers": "contrasting layers (DoLa) is not among the strategies here",
    "use_mtp": "Gemma has no multi-token prediction heads",
    "speculation_type": "use assistant_model= or prompt_lookup_num_tokens=",
    "assistant_early_exit": "Gemma's inner layers were not trained to predict tokens; use assistant_model=",
    "assistant_lookbehind": "the assistant must share the tokenizer",
    "target_lookbehind": "the assistant must share the tokenizer",
    "assistant_ensemble_weight": "assisted decoding here never changes the distribution",
    "compile_config": "compile the model itself, with torch.compile",
    "disable_compile": "generate() compiles nothing of its own accord (cuda_graphs=False turns captured steps off)",
    "continuous_batching_config": "give its settings to generate_batch()",
}


def check(name: str, value: Any) -> None:
    """Raises GenerationConfigError when a setting is outside its range."""
    if not RANGES[name].holds(value):
        raise GenerationConfigError(f"{name} is {value!r}; it must be {RANGES[name]}.")


def check_tokens(name: str, value: Any, vocab_size: int | None) -> None:
    """Raises GenerationConfigError for what is no token id, TokenOutOfRange for one outside the vocabulary."""
    for token in _tokens(name, value, TOKENS[name]):
        if not (token == -1 and name in _ABSENT):
            check_token(name, token, vocab_size)


def check_token(name: str, token: Any, vocab_size: int | None) -> None:
    if not is_whole(token) or token < 0:
        raise GenerationConfigError(f"{name} holds the token id {token!r}; it must be a whole number >= 0.")
    if vocab_size is not None and token >= vocab_size:
        raise TokenOutOfRange(
            f"{name} holds the token id {token}, which is outside the vocabulary of {vocab_size} ids "
            f"(0 to {vocab_size - 1})."
        )


def _tokens(name: str, value: Any, depths: Sequence[int]) -> Iterator[Any]:
    depth = _depth(value)
    if depth not in depths:
        shapes = " or ".join(_SHAPES[d] for d in depths)
        raise GenerationConfigError(f"{name} is {value!r}; it must be {shapes}, none of them empty.")
    yield from _leaves(value)


def _depth(value: Any) -> int | None:
    """How deep the lists are; None when they are uneven, or empty within (or, for nested ones, at all)."""
    if not isinstance(value, list | tuple):
        return 0
    inside = {_depth(v) for v in value}
    if not inside:
        return 1
    depth = inside.pop()
    if inside or depth is None or any(isinstance(v, list | tuple) and not v for v in value):
        return None
    return depth + 1


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
