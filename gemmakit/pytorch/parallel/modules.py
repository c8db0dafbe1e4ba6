"""Modules of which each process has a part, put in front of the plain ones that compute it.

Their weights are plain tensors, a process's own part: kernels read them as any others. Axis letters: B batch,
S positions, D hidden, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gemmakit.pytorch.layers import GemmaScaledEmbedding, Linear


def summed(x: Tensor, group: Any = None) -> Tensor:
    """What all processes have, added up, in place: the same bits in each of them."""
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


class Summed(nn.Module):
    """A projection of which each process has some of the inputs: what they give is added up ("rowwise")."""

    group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., I of this process) -> (..., O)."""
        return summed(super().forward(input), self.group)


class Gathered(nn.Module):
    """A projection of which each process has some of the outputs, and all get all of them ("colwise_gather_output").

    outputs: of all processes together. Each has as many as the first, but for the last, which may have fewer.
    """

    group: Any = None
    outputs: int
    widest: int

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., I) -> (..., O of all)."""
        y: Tensor = super().forward(input)
        y = F.pad(y, (0, self.widest - y.shape[-1])).contiguous()
        parts = y.new_empty(dist.get_world_size(self.group), *y.shape)
        dist.all_gather([*parts], y, group=self.group)
        return parts.movedim(0, -2).flatten(-2)[..., : self.outputs]


class SomeRows(nn.Module):
    """An embedding of which each process has some rows: the one that has a token's says it ("embedding_rowwise").

    first: the id of its first row.
    """

    group: Any = None
    first: int
    num_embeddings: int
    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, S) ids -> (B, S, D). IndexError for an id that there is not."""
        if input.is_cpu and bool(((input < 0) | (input >= self.num_embeddings)).any()):
            raise IndexError(f"an id is outside of {self.num_embeddings} rows")
        place = input - self.first
        mine = (place >= 0) & (place < len(self.weight))
        rows: Tensor = super().forward(place.where(mine, torch.zeros_like(place)))
        return summed(rows.masked_fill(~mine[..., None], 0.0), self.group)


class SummedLinear(Summed, Linear): ...


class GatheredLinear(Gathered, Linear): ...


class SomeRowsEmbedding(SomeRows, GemmaScaledEmbedding): ...
