"""What changes a step's logits: small frozen values, called with what is there so far.

Every processor takes ids (B, n), prompt and new tokens, and float32 scores (B, V), and gives scores of the same shape;
a forbidden token has -inf. `build` strings them together in the order of `gemmakit.generation.PROCESSOR_ORDER`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemmakit.generation import PROCESSOR_ORDER, GenerationConfig

Processor = Callable[[Tensor, Tensor], Tensor]
FORBIDDEN = float("-inf")


@dataclass(frozen=True)
class Context:
    """What processors may need to know beside their setting.

    padding: bool (B, P), True where the prompt is padding; None when it has none.
    """

    config: GenerationConfig
    eos: Tensor | None
    prompt_length: int
    padding: Tensor | None = None
    custom: Sequence[Processor] = ()


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of tokens that are there already are divided (if positive) or multiplied by the penalty.

    Source: arXiv:1909.05858, section 4.1. Padding counts as absent.
    """

    penalty: float
    padding: Tensor | None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.padding is not None:  # the last prompt token is never padding: it stands in
            width = self.padding.shape[1]
            prompt = torch.where(self.padding, ids[:, width - 1 : width], ids[:, :width])
            ids = torch.cat((prompt, ids[:, width:]), dim=1)
        seen = scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(seen < 0, seen * self.penalty, seen / self.penalty))


@dataclass(frozen=True)
class MinLength:
    """No eos before `length` tokens, prompt included."""

    length: int
    eos: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, self.eos, FORBIDDEN) if ids.shape[1] < self.length else scores


@dataclass(frozen=True)
class Temperature:
    temperature: float

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keep the k largest logits; those equal to the k-th stay too."""

    k: int

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        smallest = scores.topk(min(self.k, scores.shape[-1])).values[:, -1:]
        return scores.masked_fill(scores < smallest, FORBIDDEN)


@dataclass(frozen=True)
class TopP:
    """Keep the smallest set of likeliest tokens whose probability reaches p. Source: arXiv:1904.09751."""

    p: float

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        ascending, order = scores.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - self.p
        drop[:, -1] = False
        return scores.masked_fill(drop.scatter(1, order, drop), FORBIDDEN)


@dataclass(frozen=True)
class MinP:
    """Drop tokens with less than `share` of the likeliest token's probability. Source: arXiv:2407.01082."""

    share: float

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        drop = probabilities < self.share * probabilities.amax(-1, keepdim=True)
        return scores.masked_fill(drop, FORBIDDEN)


def build(context: Context) -> list[Processor]:
    """The processors that the settings ask for, in order."""
    chain: list[Processor] = []
    for name in PROCESSOR_ORDER:
        if name == "custom":
            chain.extend(context.custom)
        elif name in _BUILDERS:
            processor = _BUILDERS[name](context)
            if processor is not None:
                chain.append(processor)
    return chain


def _sampling(make: Callable[[Context], Processor | None]) -> Callable[[Context], Processor | None]:
    return lambda c: make(c) if c.config.do_sample else None


def _min_length(c: Context) -> Processor | None:
    return MinLength(c.config.min_length, c.eos) if c.eos is not None and c.config.min_length > 0 else None


def _min_new_tokens(c: Context) -> Processor | None:
    wanted = c.config.min_new_tokens
    return MinLength(c.prompt_length + wanted, c.eos) if c.eos is not None and wanted else None


def _repetition(c: Context) -> Processor | None:
    return RepetitionPenalty(c.config.repetition_penalty, c.padding) if c.config.repetition_penalty != 1.0 else None


_BUILDERS: dict[str, Callable[[Context], Processor | None]] = {
    "repetition_penalty": _repetition,
    "min_length": _min_length,
    "min_new_tokens": _min_new_tokens,
    "temperature": _sampling(lambda c: Temperature(c.config.temperature) if c.config.temperature != 1.0 else None),
    "top_k": _sampling(lambda c: TopK(c.config.top_k) if c.config.top_k else None),
    "top_p": _sampling(lambda c: TopP(c.config.top_p) if c.config.top_p < 1.0 else None),
    "min_p": _sampling(lambda c: MinP(c.config.min_p) if c.config.min_p is not None else None),
}
