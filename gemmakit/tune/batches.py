"""Which examples a step learns from, and how they are laid out: a function of the seed and the step alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gemmakit.pytorch.loss import IGNORED_LABEL, next_labels
from gemmakit.tune.examples import Example

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Order:
    """The units (rows, or packs of rows) of each step.

    An epoch is every unit once, in an order drawn from the seed and the epoch; its last step takes what is left.
    """

    units: int
    batch_size: int
    accumulate: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.units // (self.batch_size * self.accumulate))

    def step(self, number: int) -> list[list[int]]:
        """The units of each pass of a step; steps count from 0."""
        epoch, place = divmod(number, self.steps_per_epoch)
        drawn = _shuffled(self.units, self.seed, epoch)
        size = self.batch_size * self.accumulate
        units = drawn[place * size : (place + 1) * size]
        return [list(units[i : i + self.batch_size]) for i in range(0, len(units), self.batch_size)]


@lru_cache(maxsize=2)
def _shuffled(units: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(units, generator=generator).tolist())


def packs(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of up to `room` tokens from rows of these lengths, by best fit: the longest first, each where least is left.

    Raises nothing: a length over `room` was refused before.
    """
    made: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(left, (lengths[index], -1))
        if place < len(left):
            free, pack = left.pop(place)
        else:
            free, pack = room, len(made)
            made.append([])
        made[pack].append(index)
        insort(left, (free - lengths[index], pack))
    return made


def padded(examples: Sequence[Example], pad: int) -> Batch:
    """A row an example, padded on the right, with its mask. Tensors (B, S)."""
    width = max(len(example.ids) for example in examples)
    rows = [(e.ids, _labels(e), [1] * len(e.ids)) for e in examples]
    ids, labels, mask = (
        torch.tensor([row[i] + [filler] * (width - len(row[i])) for row in rows])
        for i, filler in enumerate((pad, IGNORED_LABEL, 0))
    )
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def packed(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    """A row a pack; positions restart with each example, which sees itself alone. Padding is one more document."""
    width = max(sum(len(e.ids) for e in row) for row in rows)
    made: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        left = width - sum(len(e.ids) for e in row)
        made["input_ids"].append([i for e in row for i in e.ids] + [pad] * left)
        made["labels"].append([label for e in row for label in _labels(e)] + [IGNORED_LABEL] * left)
        made["position_ids"].append([p for e in row for p in range(len(e.ids))] + list(range(left)))
    return {name: torch.tensor(values) for name, values in made.items()}


def _labels(example: Example) -> list[int]:
    return [i if on else IGNORED_LABEL for i, on in zip(example.ids, example.learnt, strict=True)]


def targets(batch: Batch) -> Tensor:
    """What each position is to predict, (B, S), or -100."""
    return next_labels(batch["labels"], batch.get("attention_mask"), batch.get("position_ids"))


def to(batch: Any, device: torch.device) -> Any:
    return {name: tensor.to(device) for name, tensor in batch.items()}
