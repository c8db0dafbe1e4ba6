"""Which function decodes, by the strategy the settings choose; and what a strategy cannot be combined with.

Axis letters: B prompts, R rows (prompts times their copies), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import GenerationConfigError, InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.strategies.assisted import assisted_generation
from gemmakit.pytorch.decode.strategies.beam import beam_search
from gemmakit.pytorch.decode.strategies.contrastive import contrastive_search
from gemmakit.pytorch.decode.strategies.prompt_lookup import prompt_lookup_decoding
from gemmakit.pytorch.decode.stream import Strategy, decode

# The names are those of GenerationConfig.get_generation_mode, and prompt_lookup for assistance without a model.
STRATEGIES: dict[str, Strategy] = {
    "greedy_search": decode,
    "sample": decode,
    "beam_search": beam_search,
    "beam_sample": beam_search,
    "group_beam_search": beam_search,
    "constrained_beam_search": beam_search,
    "contrastive_search": contrastive_search,
    "assisted_generation": assisted_generation,
    "prompt_lookup": prompt_lookup_decoding,
}
BEAMS = tuple(name for name in STRATEGIES if "beam" in name)
TAKING_BACK = ("contrastive_search", "assisted_generation", "prompt_lookup")


def choose(config: GenerationConfig, assistant: Any, streamer: Any, model: CausalLM) -> str:
    """The strategy's name. Raises GenerationConfigError or InputError, naming both, for what does not go together."""
    name = config.get_generation_mode(assistant)
    if name in BEAMS and assistant is not None:
        raise InputError(
            f"assistant_model is given and num_beams is {config.num_beams}: a draft helps one row, not beams."
        )
    if name in BEAMS and streamer is not None:
        raise InputError(
            f"streamer is given and num_beams is {config.num_beams}: a search changes its tokens until the end."
        )
    if name == "assisted_generation":
        _check_assisted(config, assistant, model)
        name = "prompt_lookup" if assistant is None else name
    if name in TAKING_BACK and not config.use_cache:
        raise GenerationConfigError(
            f"use_cache is False: {name.replace('_', ' ')} takes tokens back and needs a cache."
        )
    if name in ("greedy_search", *TAKING_BACK) and config.num_return_sequences > 1:
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
    if not isinstance(getattr(assistant, "generation_config", None), GenerationConfig):
        raise InputError(
            f"assistant_model is a {type(assistant).__module__}.{type(assistant).__name__}; it must be a gemmakit "
            "causal language model: load the draft with gemmakit.AutoModelForCausalLM."
        )
    ours, theirs = model.config.vocab_size, assistant.config.vocab_size
    if ours != theirs:
        raise InputError(
            f"assistant_model has a vocabulary of {theirs} ids and this model one of {ours}: a draft must be written "
            "in the same tokens."
        )


def copies(name: str, config: GenerationConfig) -> int:
    """Rows a prompt."""
    return config.num_beams if name in BEAMS else config.num_return_sequences


def tried(name: str, config: GenerationConfig) -> int:
    """Tokens a row that are in the cache beside those that may be kept."""
    if name != "contrastive_search":
        return 0
    return 1 if config.low_memory else config.top_k or 0


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
