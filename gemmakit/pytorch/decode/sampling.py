"""From a step's scores to a token a row, without waiting for the device.

A score row that holds no number to choose by (NaN, +inf, everything forbidden) gives NO_TOKEN, never a silent token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NO_TOKEN = -1
Pick = Callable[[Tensor], Tensor]


def greedy(scores: Tensor) -> Tensor:
    """scores: (B, V) float32 -> the first largest of each row, (B,) int64."""
    best, token = scores.max(dim=-1)  # the maximum is NaN if anything is
    return torch.where(best.isfinite(), token, NO_TOKEN)


def sampler(generators: torch.Generator | Sequence[torch.Generator] | None) -> Pick:
    """Draw from softmax(scores), with one generator for all rows, or one a row, or torch's own.

    Dividing by exponential noise and taking the largest draws exactly by probability, and needs no host.
    """

    def pick(scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        noise = torch.empty_like(probabilities)
        if isinstance(generators, Sequence):
            for row, generator in zip(noise, generators, strict=True):
                row.exponential_(generator=generator)
        else:
            noise.exponential_(generator=generators)
        token = (probabilities / noise).argmax(-1)
        return torch.where(scores.amax(-1).isfinite(), token, NO_TOKEN)

    return pick


def row_generators(seed: int, prompts: Sequence[Sequence[int]], device: torch.device) -> list[torch.Generator]:
    """One generator a row, from the seed and how many equal prompts stand above it.

    So a row draws the same whatever its neighbours are, and copies of one prompt still differ.
    """
    seen: dict[tuple[int, ...], int] = {}
    out = []
    for prompt in prompts:
        copy = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
        # An odd multiplier spreads copies of one seed away from the seeds next to it.
        out.append(torch.Generator(device).manual_seed((seed + copy * 0x9E3779B97F4A7C15) % 2**63))
    return out
