"""Processors that shape the distribution to sample from. Each leaves at least `keep` tokens a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemmakit.pytorch.decode.scores import FORBIDDEN


@dataclass(frozen=True)
class Temperature:
    """Logits divided by the temperature: below 1 sharper, above 1 flatter."""

    temperature: float

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keep the k largest logits; those equal to the k-th stay too."""

    k: int
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(scores < _largest(scores, max(self.k, self.keep)), FORBIDDEN)


# A CPU takes longer to sort a whole vocabulary than to run a layer, and the set rarely has more tokens than this.
_HEAD = 1024


@dataclass(frozen=True)
class TopP:
    """Keep the smallest set of likeliest tokens whose probability reaches p. Source: arXiv:1904.09751."""

    p: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if scores.device.type == "cpu" and scores.shape[-1] > 4 * _HEAD:
            head = self._of_head(scores)
            if head is not None:
                return head
        ascending, order = scores.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - self.p
        drop[:, -self.keep :] = False
        return scores.masked_fill(drop.scatter(1, order, drop), FORBIDDEN)

    def _of_head(self, scores: Tensor) -> Tensor | None:
        """The same from the likeliest tokens alone; None when they do not reach p."""
        best, order = scores.topk(_HEAD)
        probabilities = (best - scores.logsumexp(-1, keepdim=True)).exp()
        likelier = probabilities.cumsum(-1) - probabilities  # the probability of the tokens before each
        if not bool((likelier[:, -1] >= self.p).all()):
            return None
        drop = likelier >= self.p
        drop[:, : self.keep] = False
        return torch.full_like(scores, FORBIDDEN).scatter(1, order, best.masked_fill(drop, FORBIDDEN))


@dataclass(frozen=True)
class MinP:
    """Drop tokens with less than `share` of the likeliest token's probability. Source: arXiv:2407.01082."""

    share: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        drop = probabilities < self.share * probabilities.amax(-1, keepdim=True)
        if self.keep > 1:  # the likeliest one is never dropped
            drop = drop.scatter(1, probabilities.topk(min(self.keep, scores.shape[-1])).indices, False)
        return scores.masked_fill(drop, FORBIDDEN)


# Tokens the entropy of TopH is computed over; the rest of a peaked distribution adds little.
_CANDIDATES = 100


@dataclass(frozen=True)
class TopH:
    """Keep likeliest tokens while their part of the entropy is at most `share` of it. Source: arXiv:2509.02510."""

    share: float

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        best, index = scores.topk(min(_CANDIDATES, scores.shape[-1]))
        keep = _entropies(best).cumsum(-1) <= self.share * _entropies(best).sum(-1, keepdim=True)
        keep[:, 0] = True
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).scatter(1, index, ~keep), FORBIDDEN)


@dataclass(frozen=True)
class Typical:
    """Keep the tokens whose surprise is nearest to the entropy, up to probability p. Source: arXiv:2202.00666."""

    p: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        logs = scores.log_softmax(-1)
        entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
        distance, order = (-logs - entropy).abs().sort(dim=-1)
        covered = scores.gather(-1, order).softmax(-1).cumsum(-1)
        last = (covered < self.p).sum(-1, keepdim=True).clamp_max(scores.shape[-1] - 1)
        drop = distance > distance.gather(-1, last)
        drop[:, : self.keep] = False
        return scores.masked_fill(drop.scatter(1, order, drop), FORBIDDEN)


@dataclass(frozen=True)
class Epsilon:
    """Drop tokens less likely than the floor. Source: arXiv:2210.15191, section 4.1."""

    floor: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return _above(self.floor, scores, self.keep)


@dataclass(frozen=True)
class Eta:
    """As Epsilon, with a floor that sinks as the entropy grows. Source: arXiv:2210.15191, section 4.2."""

    floor: float
    keep: int = 1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        expected = self.floor**0.5 * (-_entropies(scores).sum(-1, keepdim=True)).exp()
        return _above(expected.clamp_max(self.floor), scores, self.keep)


@dataclass(frozen=True)
class Renormalized:
    """Scores become log probabilities."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)


def _above(floor: float | Tensor, scores: Tensor, keep: int) -> Tensor:
    drop = (scores.softmax(-1) < floor) & (scores < _largest(scores, keep))
    return scores.masked_fill(drop, FORBIDDEN)


def _largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest score of each row, (B, 1)."""
    return scores.topk(min(k, scores.shape[-1])).values[:, -1:]


def _entropies(scores: Tensor) -> Tensor:
    """Each token's part of the entropy, -p ln p; 0 for a forbidden one."""
    return torch.special.entr(scores.softmax(-1))
