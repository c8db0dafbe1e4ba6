"""Processors that forbid tokens or leave only some, in every strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import InputError, TokenOutOfRange
from gemmakit.pytorch.decode.scores import FORBIDDEN

# (row of the batch, its ids so far (n,)) -> the ids that may come next
AllowedTokens = Callable[[int, Tensor], Sequence[int]]


@dataclass(frozen=True)
class MinLength:
    """No eos before `length` tokens, prompt included."""

    length: int
    eos: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, self.eos, FORBIDDEN) if ids.shape[1] < self.length else scores


@dataclass(frozen=True)
class ForcedAt:
    """When there are `length` tokens, one of `tokens` comes next, whatever the model says."""

    length: int
    tokens: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != self.length:
            return scores
        return torch.full_like(scores, FORBIDDEN).index_fill(1, self.tokens, 0.0)


@dataclass(frozen=True)
class Suppressed:
    """`tokens` never come; or, with `length`, not when there are that many tokens."""

    tokens: Tensor
    length: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.length is not None and ids.shape[1] != self.length:
            return scores
        return scores.index_fill(1, self.tokens, FORBIDDEN)


@dataclass(frozen=True)
class OnlyFinite:
    """NaN becomes 0 and the infinities the largest and smallest finite number."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.nan_to_num(nan=0.0)


@dataclass(frozen=True)
class PrefixAllowed:
    """Only what `allowed` names may come next. Source: arXiv:2010.00904.

    rows: rows of the batch that belong to one prompt (its beams); `allowed` is told the prompt's number. It runs on the
    host, so every step waits for the device.
    """

    allowed: AllowedTokens
    rows: int

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        may = torch.zeros_like(scores, dtype=torch.bool)
        for row in range(ids.shape[0]):
            may[row, self._ids(row, ids, scores.shape[-1])] = True
        kept = scores.masked_fill(~may, FORBIDDEN)
        # Where other processors forbid everything this allows, for all beams of a prompt, this one decides alone.
        stuck = kept.amax(-1).isneginf().view(-1, self.rows).all(-1).repeat_interleave(self.rows)
        alone = torch.zeros_like(scores).masked_fill(~may, FORBIDDEN)
        return torch.where(stuck[:, None], alone, kept)

    def _ids(self, row: int, ids: Tensor, vocabulary: int) -> Tensor:
        prompt = row // self.rows
        tokens: Any = self.allowed(prompt, ids[row])
        tokens = torch.as_tensor(tokens, dtype=torch.long, device=ids.device)
        if not len(tokens):
            raise InputError(
                f"prefix_allowed_tokens_fn gave no token for prompt {prompt} after {ids.shape[1]} tokens: it must "
                "allow at least one, for instance eos."
            )
        if not bool(((tokens >= 0) & (tokens < vocabulary)).all()):
            wrong = next(t for t in tokens.tolist() if not 0 <= t < vocabulary)
            raise TokenOutOfRange(
                f"prefix_allowed_tokens_fn gave the token id {wrong}, which is outside the vocabulary of "
                f"{vocabulary} ids."
            )
        return tokens
