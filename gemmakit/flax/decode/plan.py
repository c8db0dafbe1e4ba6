"""How to decode: what is compiled in, and what only changes numbers.

Axis letters: B prompts, R rows (prompts times their copies), P prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gemmakit.errors import GenerationConfigError
from gemmakit.generation import GenerationConfig

# (ids (R, P + room), scores (R, V), how many of the ids are there) -> scores
Custom = Callable[[Any, Any, Any], Any]

# The settings this backend has, and those that change nothing here: its loop always keeps a cache, a static one.
SUPPORTED = frozenset((
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "num_beams", "early_stopping",
    "length_penalty", "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "suppress_tokens",
    "begin_suppress_tokens", "forced_eos_token_id", "renormalize_logits", "num_return_sequences", "pad_token_id",
    "bos_token_id", "eos_token_id", "return_dict_in_generate", "output_scores", "use_cache", "extra",
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
    force_last: tuple[int, ...] = ()
    custom: tuple[Custom, ...] = ()
    early_stopping: bool | str = False
    results: int = 1  # of a search, a prompt

    @property
    def keep(self) -> int:
        """Tokens that truncation leaves: a beam needs one beside every eos, to go on."""
        return 1 if "beams" not in self.on else len(self.eos) + 1


def make_plan(config: GenerationConfig, room: int, custom: tuple[Custom, ...]) -> Plan:
    beams = config.num_beams > 1
    forced = config.forced_eos_token_id
    return Plan(
        room=room,
        eos=config.eos_token_ids,
        pad=config.filler,
        copies=config.num_beams if beams else config.num_return_sequences,
        do_sample=config.do_sample,
        on=frozenset(_on(config)),
        suppress=tuple(config.suppress_tokens or ()),
        suppress_first=tuple(config.begin_suppress_tokens or ()),
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
        "cache_implementation": (None, "static", "dynamic"),
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
