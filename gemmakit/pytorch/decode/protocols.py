"""Bases and lists under the names that transformers' users know. A plain function or list does as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self:
            done |= torch.as_tensor(criterion(input_ids, scores, **kwargs), device=input_ids.device)
        return done
