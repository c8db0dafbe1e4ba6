"""What decoding asks of a model and of processors; and bases and lists of these and of criteria, as transformers has.

A plain function or list does as well as these. Protocols are checkable at run time, as annotations of shapes need.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.generation import GenerationConfig


@runtime_checkable
class CausalLM(Protocol):
    """A causal language model, as far as decoding knows it. `model`: its decoder, whose `layers` take a cache."""

    config: GemmaConfig
    generation_config: GenerationConfig
    model: Any
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Of what the decoder gave, (..., D) -> (..., V)."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A pass: input_ids or inputs_embeds, attention_mask, position_ids, past_key_values, use_cache,
        output_attentions, output_hidden_states, return_dict, logits_to_keep -> CausalLMOutputWithPast."""
        ...


@runtime_checkable
class Processor(Protocol):
    """ids (B, n) int64, prompt and new tokens, and scores (B, V) float32 -> scores (B, V)."""

    def __call__(self, ids: Tensor, scores: Tensor, /) -> Tensor: ...


class LogitsProcessor:
    """Base for processors of one's own: override __call__(ids (B, n), scores (B, V)) -> scores (B, V)."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(input_ids, scores).")


class StoppingCriteria:
    """Base for criteria of one's own: override __call__(ids (B, n), scores (B, V)) -> bool (B,), or one bool."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(input_ids, scores).")


class LogitsProcessorList(list[Any]):
    """Processors, applied in order when called."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteriaList(list[Any]):
    """Criteria; when called, bool (B,), True where any of them ends the row."""

    @property
    def max_length(self) -> int | None:
        """The smallest length that a criterion ends rows at, None where none does."""
        return min((c.max_length for c in self if isinstance(getattr(c, "max_length", None), int)), default=None)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self:
            done |= torch.as_tensor(criterion(input_ids, scores, **kwargs), device=input_ids.device)
        return done
