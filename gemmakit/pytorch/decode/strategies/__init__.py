"""Which function decodes, by the strategy the settings choose; and what a strategy cannot be combined with.

Axis letters: B prompts, R rows (prompts times their copies), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import GenerationConfigError, InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.drafts import check_assistant
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.step import Plan
from gemmakit.pytorch.decode.strategies.assisted import assisted_generation
from gemmakit.pytorch.decode.strategies.beam import beam_search
from gemmakit.pytorch.decode.strategies.contrastive import contrastive_search
from gemmakit.pytorch.decode.strategies.prompt_lookup import plain_decoding, prompt_lookup_decoding
from gemmakit.pytorch.decode.stream import Steps


def _none_tried(config: GenerationConfig) -> int:
    return 0


def _candidates(config: GenerationConfig) -> int:
    return 1 if config.low_memory else config.top_k or 0


@dataclass(frozen=True)
class Strategy:
    """decode: gives the steps of a call. beams: it searches, with rows that change until the end. takes_back: tokens
    leave its cache again. one_result: a prompt has no more. tried: tokens a row that are in the cache beside those that
    may be kept. looks_back: it says itself who sees whom, of all tokens.
    """

    decode: Callable[[CausalLM, Prompt, Plan], Steps[Any]]
    beams: bool = False
    takes_back: bool = False
    one_result: bool = False
    tried: Callable[[GenerationConfig], int] = _none_tried
    looks_back: bool = False

    def rows(self, config: GenerationConfig) -> int:
        """Rows a prompt."""
        return config.num_beams if self.beams else config.num_return_sequences


# The names are those of GenerationConfig.get_generation_mode, and prompt_lookup for assistance without a model.
STRATEGIES: dict[str, Strategy] = {
    "greedy_search": Strategy(plain_decoding, one_result=True),
    "sample": Strategy(plain_decoding),
    "beam_search": Strategy(beam_search, beams=True),
    "beam_sample": Strategy(beam_search, beams=True),
    "group_beam_search": Strategy(beam_search, beams=True),
    "constrained_beam_search": Strategy(beam_search, beams=True),
    "contrastive_search": Strategy(
        contrastive_search, takes_back=True, one_result=True, tried=_candidates, looks_back=True
    ),
    "assisted_generation": Strategy(assisted_generation, takes_back=True, one_result=True),
    "prompt_lookup": Strategy(prompt_lookup_decoding, takes_back=True, one_result=True),
}


def choose(config: GenerationConfig, assistant: Any, streamer: Any, model: CausalLM) -> str:
    """The strategy's name. Raises GenerationConfigError or InputError, naming both, for what does not go together."""
    name = config.get_generation_mode(assistant)
    beams = STRATEGIES[name].beams
    if beams and assistant is not None:
        raise InputError(
            f"assistant_model is given and num_beams is {config.num_beams}: a draft helps one row, not beams."
        )
    if beams and streamer is not None:
        raise InputError(
            f"streamer is given and num_beams is {config.num_beams}: a search changes its tokens until the end."
        )
    if name == "assisted_generation":
        _check_assisted(config, assistant, model)
        name = "prompt_lookup" if assistant is None else name
    if STRATEGIES[name].takes_back and not config.use_cache:
        raise GenerationConfigError(
            f"use_cache is False: {name.replace('_', ' ')} takes tokens back and needs a cache."
        )
    if STRATEGIES[name].one_result and config.num_return_sequences > 1:
        raise GenerationConfigError(
            f"num_return_sequences is {config.num_return_sequences}, but {name.replace('_', ' ')} has one result a "
            "prompt: set do_sample=True or num_beams."
        )
    return name


def _check_assisted(config: GenerationConfig, assistant: Any, model: CausalLM) -> None:
    if config.penalty_alpha:
        raise GenerationConfigError(
            f"penalty_alpha is {config.penalty_alpha}, but drafts are asked for too (assistant_model or "
            "prompt_lookup_num_tokens): choose one strategy."
        )
    if assistant is None:
        return
    if config.prompt_lookup_num_tokens is not None:
        raise GenerationConfigError(
            f"prompt_lookup_num_tokens is {config.prompt_lookup_num_tokens} and assistant_model is given: drafts come "
            "from one of them."
        )
    check_assistant(assistant, model)


def transition_scores(
    sequences: Tensor, scores: Sequence[Tensor], beam_indices: Tensor | None, normalize_logits: bool
) -> Tensor:
    """float32 (B * num_return_sequences, new): each new token's score; 0 after a row's end."""
    steps = torch.stack(tuple(scores))  # (new, R, V)
    if normalize_logits:
        steps = steps.log_softmax(-1)
    if beam_indices is None:
        beam_indices = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, len(steps))
    ended = beam_indices < 0
    length = int((~ended).sum(-1).max())
    ended, rows = ended[:, :length], beam_indices[:, :length].clamp_min(0)
    tokens = sequences[:, sequences.shape[1] - length :]
    at = torch.arange(length, device=sequences.device)
    return steps[at, rows.long(), tokens].masked_fill(ended, 0.0)
