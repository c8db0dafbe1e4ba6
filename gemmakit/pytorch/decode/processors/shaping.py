"""Processors that make tokens likelier or less likely by what is there already, in every strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemmakit.pytorch.decode.scores import FORBIDDEN, penalized, presence, rows_of, seen


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of tokens that are there already are divided (if positive) or multiplied by the penalty.

    Source: arXiv:1909.05858, section 4.1. Padding counts as absent.
    """

    penalty: float
    padding: Tensor | None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return penalized(scores, self.penalty, presence(seen(ids, _rows(self.padding, ids)), scores.shape[-1]))


@dataclass(frozen=True)
class PromptBonus:
    """The inverse penalty for the prompt's own tokens: above 1 it keeps the text close to them.

    prompt: (R, P) with NOTHING on padding. The name it has in GenerationConfig, encoder_repetition_penalty, is older
    than decoder-only models.
    """

    penalty: float
    prompt: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        there = presence(self.prompt, scores.shape[-1])
        return penalized(scores, 1 / self.penalty, rows_of(there, scores.shape[0]))


@dataclass(frozen=True)
class NoRepeatNgram:
    """Forbids each token that would complete an n-gram a second time. Source: arXiv:1705.04304, section 2.5."""

    size: int
    padding: Tensor | None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        ids = seen(ids, _rows(self.padding, ids))
        return _without_completions(ids, ids, self.size, scores)


@dataclass(frozen=True)
class NoPromptNgram:
    """Forbids each token that would complete an n-gram of the prompt (R, P), NOTHING on padding."""

    size: int
    prompt: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return _without_completions(rows_of(self.prompt, ids.shape[0]), ids, self.size, scores)


def _without_completions(text: Tensor, ids: Tensor, size: int, scores: Tensor) -> Tensor:
    """Forbid what follows, anywhere in text (B, m), the last size - 1 tokens of ids (B, n)."""
    if text.shape[1] < size or ids.shape[1] < size - 1:
        return scores
    grams = text.unfold(1, size, 1)  # (B, m - size + 1, size)
    ending = ids[:, ids.shape[1] - (size - 1) :]
    matches = (grams[..., :-1] == ending[:, None]).all(-1)
    completions = torch.where(matches, grams[..., -1], -1)
    return scores.masked_fill(presence(completions, scores.shape[-1]), FORBIDDEN)


@dataclass(frozen=True)
class SequenceBias:
    """Adds to the logit of a sequence's last token wherever the tokens before it are there.

    single: (V,) for sequences of one token. longer: a group a length, of beginnings (G, m), last tokens (G,) and
    biases (G,).
    """

    single: Tensor
    longer: Sequence[tuple[Tensor, Tensor, Tensor]]
    padding: Tensor | None

    @classmethod
    def of(
        cls, biases: Mapping[tuple[int, ...], float], vocabulary: int, padding: Tensor | None, device: torch.device
    ) -> SequenceBias:
        single = torch.zeros(vocabulary, dtype=torch.float32, device=device)
        by_length: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for ids, bias in biases.items():
            if len(ids) == 1:
                single[ids[0]] = bias
            else:
                by_length.setdefault(len(ids), []).append((ids, bias))
        longer = [_group(group, device) for group in by_length.values()]
        return cls(single, longer, padding)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        ids = seen(ids, _rows(self.padding, ids))
        bias = self.single.expand_as(scores).clone()
        for beginnings, last, amounts in self.longer:
            length = beginnings.shape[1]
            if length > ids.shape[1]:
                continue
            matches = (ids[:, None, -length:] == beginnings).all(-1)
            bias.index_add_(1, last, torch.where(matches, amounts, 0.0))
        return scores + bias


def _group(group: Sequence[tuple[tuple[int, ...], float]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    beginnings = torch.tensor([ids[:-1] for ids, _ in group], device=device)
    last = torch.tensor([ids[-1] for ids, _ in group], device=device)
    return beginnings, last, torch.tensor([bias for _, bias in group], dtype=torch.float32, device=device)


def bad_words(words: Sequence[Sequence[int]], eos: Sequence[int]) -> dict[tuple[int, ...], float]:
    """The biases that forbid these sequences; a lone eos stays allowed, or nothing could end."""
    return {tuple(word): FORBIDDEN for word in words if not (len(word) == 1 and word[0] in eos)}


@dataclass(frozen=True)
class EosDecay:
    """After `start` tokens, prompt included, eos gains |logit| * (factor ** further tokens - 1)."""

    start: int
    factor: float
    eos: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        further = ids.shape[1] - self.start
        if further <= 0:
            return scores
        logits = scores[:, self.eos]
        gain = (logits.abs() * (self.factor**further - 1)).masked_fill(~logits.isfinite(), 0.0)
        return scores.index_copy(1, self.eos, logits + gain)


def _rows(padding: Tensor | None, ids: Tensor) -> Tensor | None:
    return None if padding is None else rows_of(padding, ids.shape[0])
