"""What processors share: their signature, the score of a forbidden token, and which ids count as seen."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

FORBIDDEN = float("-inf")
# Stands where padding is: no token has this id, so nothing is ever found there.
NOTHING = -1


class Processor(Protocol):
    """ids (B, n) int64, prompt and new tokens, and scores (B, V) float32 -> scores (B, V)."""

    def __call__(self, ids: Tensor, scores: Tensor, /) -> Tensor: ...


def seen(ids: Tensor, padding: Tensor | None) -> Tensor:
    """ids (B, n) with NOTHING in place of the prompt's padding, bool (B, P)."""
    if padding is None:
        return ids
    width = padding.shape[1]
    return torch.cat((ids[:, :width].masked_fill(padding, NOTHING), ids[:, width:]), dim=1)


def presence(ids: Tensor, vocabulary: int) -> Tensor:
    """bool (B, V): which tokens are among ids (B, n); NOTHING is none of them."""
    found = torch.zeros((ids.shape[0], vocabulary + 1), dtype=torch.bool, device=ids.device)
    return found.scatter_(1, torch.where(ids < 0, vocabulary, ids), True)[:, :vocabulary]


def rows_of(prompt: Tensor, rows: int) -> Tensor:
    """(R, ...) for the rows of a search, repeated from one a prompt where there are several beams."""
    return prompt if prompt.shape[0] == rows else prompt.repeat_interleave(rows // prompt.shape[0], dim=0)


def penalized(scores: Tensor, penalty: float, where: Tensor) -> Tensor:
    """Scores divided by the penalty if positive, multiplied if not, `where` (B, V) is True."""
    return torch.where(where, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
