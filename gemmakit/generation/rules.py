"""How settings act together: which contradict each other, and which have no effect as the others stand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

from gemmakit.errors import GenerationConfigError
from gemmakit.generation.settings import DEFAULTS, Settings

# What only sampling, beams or a cache read; at their defaults they are off.
_SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")
_CACHE = ("cache_implementation", "cache_config")
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_STATIC = ("static", "offloaded_static")


def refuse_contradictions(c: Settings) -> None:
    """Raises GenerationConfigError naming both settings and the remedy."""
    for trouble in _contradictions(c):
        raise GenerationConfigError(trouble)


def _contradictions(c: Settings) -> Iterator[str]:
    yield from _beams(c)
    yield from _strategies(c)
    yield from _lengths(c)
    yield from _tokens(c)


def _beams(c: Settings) -> Iterator[str]:
    if c.num_beams > 1 and c.num_return_sequences > c.num_beams:
        yield (
            f"num_return_sequences is {c.num_return_sequences}, but num_beams is {c.num_beams}: a search has at most "
            "num_beams results."
        )
    groups = c.num_beam_groups
    if groups > 1:
        if c.num_beams == 1:
            yield f"num_beam_groups is {groups}, but num_beams is 1: set num_beams to a multiple of {groups}."
        if c.num_beams % groups:
            yield f"num_beams is {c.num_beams} and num_beam_groups is {groups}: groups share the beams evenly."
        if c.do_sample:
            yield f"num_beam_groups is {groups} and do_sample is True: groups of beams are searched, not sampled."
        if c.diversity_penalty == 0:
            yield f"num_beam_groups is {groups} and diversity_penalty is 0.0: the groups would be equal."
    elif c.diversity_penalty:
        yield f"diversity_penalty is {c.diversity_penalty}, but num_beam_groups is 1: it acts between groups of beams."


def _strategies(c: Settings) -> Iterator[str]:
    for name in ("constraints", "force_words_ids"):
        if getattr(c, name) is None:
            continue
        if c.num_beams == 1:
            yield f"{name} is given, but num_beams is 1: constrained beam search needs at least 2 beams."
        if c.do_sample or c.num_beam_groups > 1:
            yield f"{name} is given with do_sample or num_beam_groups: constrained beam search has neither."
    if c.constraints is not None and c.force_words_ids is not None:
        yield "constraints and force_words_ids are both given: give one of them."
    if c.penalty_alpha and (c.do_sample or c.num_beams > 1):
        other = "do_sample is True" if c.do_sample else f"num_beams is {c.num_beams}"
        yield f"penalty_alpha is {c.penalty_alpha} (contrastive search), but {other}: choose one strategy."
    if c.prompt_lookup_num_tokens and c.num_beams > 1:
        yield f"prompt_lookup_num_tokens is {c.prompt_lookup_num_tokens}, but num_beams is {c.num_beams}: choose one."
    shapes = [n for n in ("json_schema", "regex", "grammar") if getattr(c, n) is not None]
    if len(shapes) > 1:
        yield f"{' and '.join(shapes)} are both given: the output can follow one of them."


def _lengths(c: Settings) -> Iterator[str]:
    if c.min_new_tokens and c.max_new_tokens and c.min_new_tokens > c.max_new_tokens:
        yield f"min_new_tokens is {c.min_new_tokens}, but max_new_tokens is {c.max_new_tokens}."
    settled = c.max_new_tokens is not None or c.min_new_tokens is not None  # these win
    if not settled and c.max_length is not None and c.min_length > c.max_length:
        yield f"min_length is {c.min_length}, but max_length is {c.max_length}."


def _tokens(c: Settings) -> Iterator[str]:
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = getattr(c, name)
        ids = {forced} if isinstance(forced, int) else set(forced or ())
        if ids and c.suppress_tokens is not None and ids <= set(c.suppress_tokens):
            yield f"{name} is {forced!r}, but suppress_tokens forbids it: take it out of one of them."


def unread(get: Callable[[str], Any]) -> tuple[str, ...]:
    """Settings that nothing reads as the others stand, of those that shape sampling. get: a setting's value."""
    if get("do_sample"):
        return ()
    return _SAMPLING if get("penalty_alpha") else (*_SAMPLING, "top_k")


def warn_of_no_effect(c: Settings, asked: Collection[str] | None = None) -> None:
    """Say which settings do nothing as the others stand; of those in `asked` alone, when given.

    What a model's own file holds is not the caller's doing: sampling settings there are no news to a greedy call.
    """
    for name, why in _no_effect(c):
        if asked is None or name in asked:
            warnings.warn(f"{name} is {getattr(c, name)!r}, but {why}", stacklevel=5)


def _no_effect(c: Settings) -> Iterator[tuple[str, str]]:
    if not c.do_sample:
        why = "do_sample is False: it shapes sampling only. Set do_sample=True or leave it out."
        yield from ((n, why) for n in _SAMPLING if getattr(c, n) != DEFAULTS[n])
        if c.top_k not in (0, 50) and not c.penalty_alpha:  # contrastive search takes top_k candidates
            yield "top_k", why
    if c.num_beams == 1:
        why = "num_beams is 1: it acts on beam search only. Set num_beams above 1 or leave it out."
        yield from ((n, why) for n in _BEAMS if getattr(c, n) != DEFAULTS[n])
    if not c.use_cache:
        yield from ((n, "use_cache is False.") for n in _CACHE if getattr(c, n) != DEFAULTS[n])
    if c.max_cache_len is not None and c.cache_implementation not in _STATIC:
        yield "max_cache_len", 'only static caches have a length: set cache_implementation="static".'
    if not c.return_dict_in_generate:
        why = "return_dict_in_generate is False, so there is nowhere to put it."
        yield from ((n, why) for n in _OUTPUTS if getattr(c, n))
    if c.min_length and c.min_new_tokens is not None:
        yield "min_length", "min_new_tokens is set, which wins. Leave one of them out."
    if c.low_memory and not c.penalty_alpha:
        yield "low_memory", "penalty_alpha is not set: it is a setting of contrastive search."
