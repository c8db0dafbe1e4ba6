"""From generate()'s arguments to what is compiled and what it is given: ids and mask, the plan, the numbers.

On the host, in numpy: a jax operation of its own would compile for every length.
Axis letters: B batch, P prompt positions, R rows (prompts times their copies), V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemmakit.config import GemmaConfig
from gemmakit.errors import GenerationConfigError, InputError, TokenOutOfRange
from gemmakit.flax.loss import check_array
from gemmakit.generation import GenerationConfig

SHORTEST = 16
# (ids (R, P + room), scores (R, V), how many of the ids are there) -> scores
Custom = Callable[[Any, Any, Any], Any]

# The settings this backend has, and those that change nothing here: its loop always keeps a cache, a static one.
SUPPORTED = frozenset((
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "num_beams", "early_stopping",
    "length_penalty", "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "no_repeat_ngram_size", "renormalize_logits",
    "num_return_sequences", "pad_token_id", "bos_token_id", "eos_token_id", "return_dict_in_generate", "output_scores",
    "use_cache", "extra",
))  # fmt: skip
STRATEGIES = ("greedy_search", "sample", "beam_search", "beam_sample")


@dataclass(frozen=True)
class Plan:
    """What decides the compiled code. Two calls with equal plans and shapes share it.

    room: places for new tokens, at least as many as are asked for. on: the numeric settings that are in use; their
    values are arguments (`knobs`), so that another temperature compiles nothing.
    """

    room: int
    eos: tuple[int, ...]
    pad: int
    copies: int  # rows a prompt
    do_sample: bool
    on: frozenset[str]
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()
    no_repeat_ngram_size: int = 0
    force_first: tuple[int, ...] = ()
    force_last: tuple[int, ...] = ()
    custom: tuple[Custom, ...] = ()
    early_stopping: bool | str = False
    results: int = 1  # of a search, a prompt

    @property
    def keep(self) -> int:
        """Tokens that truncation leaves: a beam needs one beside every eos, to go on."""
        return 1 if "beams" not in self.on else len(self.eos) + 1


def make_plan(config: GenerationConfig, prompt_length: int, room: int, custom: tuple[Custom, ...]) -> Plan:
    """prompt_length: as the caller has it, with the padding of shorter rows."""
    beams = config.num_beams > 1
    first, forced = config.forced_bos_token_id, config.forced_eos_token_id
    return Plan(
        room=room,
        eos=config.eos_token_ids,
        pad=config.filler,
        copies=config.num_beams if beams else config.num_return_sequences,
        do_sample=config.do_sample,
        on=frozenset(_on(config)),
        suppress=tuple(config.suppress_tokens or ()),
        suppress_first=tuple(config.begin_suppress_tokens or ()),
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        force_first=() if first is None or prompt_length > 1 else (first,),
        force_last=() if forced is None else (forced,) if isinstance(forced, int) else tuple(forced),
        custom=custom,
        early_stopping=config.early_stopping,
        results=config.num_return_sequences,
    )


def knobs(config: GenerationConfig, new: int, prompt_length: int) -> dict[str, np.ndarray]:
    """The numbers of a call. limit: new tokens; minimum: new tokens before any eos."""
    given = config.min_new_tokens
    minimum = max(config.min_length - prompt_length, 0) if given is None else given
    real = {n: getattr(config, n) or 0.0 for n in ("temperature", "top_p", "min_p", "repetition_penalty")}
    return {
        "limit": np.int32(new),
        "minimum": np.int32(minimum),
        "top_k": np.int32(config.top_k or 0),
        "length_penalty": np.float32(config.length_penalty),
        **{name: np.float32(value) for name, value in real.items()},
    }  # type: ignore[return-value]


def _on(config: GenerationConfig) -> list[str]:
    sampling = {
        "temperature": config.temperature != 1.0,
        "top_k": bool(config.top_k),
        "top_p": config.top_p < 1.0,
        "min_p": config.min_p is not None,
    }
    out = [name for name, wanted in sampling.items() if wanted and config.do_sample]
    always = {
        "repetition_penalty": config.repetition_penalty != 1.0,
        "minimum": bool(config.eos_token_ids) and bool(config.min_length or config.min_new_tokens),
        "renormalize_logits": config.renormalize_logits,
        "beams": config.num_beams > 1,
    }
    return out + [name for name, wanted in always.items() if wanted]


def refuse_unsupported(config: GenerationConfig) -> None:
    """Raises GenerationConfigError for a setting that this backend would have to drop."""
    mode = config.get_generation_mode()
    if mode not in STRATEGIES:
        raise GenerationConfigError(
            f"the settings ask for {mode.replace('_', ' ')}; the Flax backend has {', '.join(STRATEGIES)}. "
            "Use the PyTorch backend for it."
        )
    if mode == "greedy_search" and config.num_return_sequences > 1:
        raise GenerationConfigError(
            f"num_return_sequences is {config.num_return_sequences}, but greedy search has one result a prompt: "
            "set do_sample=True or num_beams."
        )
    allowed = {
        "cache_implementation": (None, "static", "dynamic", "hybrid"),  # files of Gemma 3 ask for the last
        "output_scores": (False, *(True,) * (config.num_beams > 1)),
    }
    for field in fields(config):
        value = getattr(config, field.name)
        fine = value in allowed[field.name] if field.name in allowed else (
            field.name in SUPPORTED or value == field.default
        )  # fmt: skip
        if not fine:
            raise GenerationConfigError(
                f"{field.name} is {value!r}: the Flax backend's compiled loop does not have this setting. "
                "Leave it out, or use the PyTorch backend."
            )


@dataclass
class Prompt:
    """ids, mask: (B, P), as given. new: how many tokens may follow."""

    ids: Any
    mask: Any
    new: int

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 and mask bool, (B, bucket(P)), padded on the left."""
        width = bucket(self.ids.shape[1]) - self.ids.shape[1]
        around = ((0, 0), (width, 0))
        return np.pad(self.ids, around).astype(np.int32), np.pad(self.mask, around)


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is not below `length`: at most half as much again."""
    size = SHORTEST
    while size < length:
        size *= 2
    middle = size // 4 * 3
    return middle if middle >= max(length, SHORTEST) else size


def prepare(model: GemmaConfig, config: GenerationConfig, ids: Any, mask: Any) -> Prompt:
    """Raises InputError, TokenOutOfRange, PromptTooLong."""
    ids = _ids(model, config, ids)
    mask = _mask(config, ids, mask)
    _check_bos(config, ids, mask)
    new, _ = config.new_tokens(model.max_position_embeddings, ids.shape[1], int(mask.sum(-1).max()))
    return Prompt(ids, mask, new)


def traced(model: GemmaConfig, config: GenerationConfig, ids: Any, mask: Any) -> Prompt:
    """The same inside a caller's jit: what depends on values cannot be checked."""
    mask = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    new, _ = config.new_tokens(model.max_position_embeddings, ids.shape[1], ids.shape[1])
    return Prompt(ids.astype(jnp.int32), mask, new)


def _ids(model: GemmaConfig, config: GenerationConfig, ids: Any) -> np.ndarray:
    check_array("input_ids", ids, "generate")
    ids = np.zeros((1, 0), np.int32) if ids is None else np.asarray(ids)
    if ids.size == 0:
        if config.bos_token_id is None or config.bos_token_id < 0:
            raise InputError("there is no prompt and no bos_token_id to start from: give input_ids.")
        return np.full((ids.shape[0] if ids.ndim == 2 else 1, 1), config.bos_token_id, np.int32)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"input_ids has shape {ids.shape} and dtype {ids.dtype}; give whole numbers (B, P).")
    low, high, size = int(ids.min()), int(ids.max()), model.vocab_size
    if low < 0 or high >= size:
        raise TokenOutOfRange(
            f"token id {low if low < 0 else high} is outside the vocabulary of {size} ids (0 to {size - 1}): "
            "was the prompt encoded with another model's tokenizer?"
        )
    return ids


def _mask(config: GenerationConfig, ids: np.ndarray, mask: Any) -> np.ndarray:
    """bool (B, P), from the caller or, where that is safe, from the pad token."""
    check_array("attention_mask", mask, "generate")
    mask = _inferred(config, ids) if mask is None else np.asarray(mask)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has shape {mask.shape}; it must be {ids.shape}, like input_ids.")
    mask = mask.astype(bool)
    for row in np.flatnonzero(~mask.any(-1))[:1]:
        raise InputError(f"row {row} of the batch is all padding: give it at least the <bos> token.")
    for row in np.flatnonzero(~mask[:, -1])[:1]:
        raise InputError(
            f"row {row} is padded on the right, where its new tokens would come: pad on the left "
            '(tokenizer.padding_side = "left").'
        )
    return mask


def _inferred(config: GenerationConfig, ids: np.ndarray) -> np.ndarray:
    """Pad tokens hide when they form a run at the left of a row and nothing else."""
    pad = config.pad_token_id
    whole = np.ones(ids.shape, bool)
    if pad is None or pad in config.eos_token_ids:
        return whole
    is_pad = ids == pad
    if (is_pad[:, 1:] & ~is_pad[:, :-1]).any():
        warnings.warn(
            f"the prompt holds the pad token ({pad}) after other tokens and there is no attention_mask: it is taken as "
            "an ordinary token. Pass attention_mask if it is padding.",
            stacklevel=5,
        )
        return whole
    return ~is_pad


def _check_bos(config: GenerationConfig, ids: np.ndarray, mask: np.ndarray) -> None:
    """Gemma was trained with exactly one <bos> in front; without it, or with two, its text is much worse."""
    bos = config.bos_token_id
    if bos is None:
        return
    first, rows = mask.argmax(-1), np.arange(len(ids))
    second = np.minimum(first + 1, ids.shape[1] - 1)
    if (ids[rows, first] != bos).any():
        warnings.warn("a prompt does not begin with <bos>: Gemma's text is much worse without it.", stacklevel=4)
    elif ((ids[rows, second] == bos) & (second > first)).any():
        warnings.warn("a prompt begins with two <bos> tokens: Gemma was trained with one.", stacklevel=4)
