"""What a step minimises: one loop for every method, for what differs is the data and this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.pytorch.loss import IGNORED_LABEL, row_logprobs
from gemmakit.pytorch.masks import segments_pay
from gemmakit.tune.batches import Batch, packed, packs, padded, targets
from gemmakit.tune.examples import Example, Pair


class Objective(Protocol):
    """Units (rows, packs, pairs) to batches, and batches to a loss that sums over the passes of a step."""

    def __len__(self) -> int:
        """Units."""
        ...

    def batch(self, units: Sequence[int]) -> Batch: ...

    def items(self, batch: Batch) -> int:
        """What the loss of a step is the mean over."""
        ...

    def loss(self, model: Any, batch: Batch, num_items: int) -> Tensor:
        """The batch's part of the mean over `num_items`, in float32."""
        ...

    def where(self, units: Sequence[int]) -> list[str]:
        """The rows' lines."""
        ...

    def length(self, unit: int) -> int:
        """Tokens."""
        ...

    def tokens(self, units: Sequence[int]) -> int:
        """Of a batch of these, with padding."""
        ...


class NextTokens:
    """Cross entropy of what is learnt of each example; packed, as many examples a row as `room` tokens hold.

    joined: up to this length examples of a pass stand end to end in one row, without padding, where they are long
    enough to be attended to one by one.
    """

    def __init__(self, examples: Sequence[Example], pad: int, chunk: int, room: int | None = None, joined: int = 0):
        self.examples, self.pad, self.chunk, self.packed = examples, pad, chunk, room is not None
        self.joined = joined
        lengths = [len(example.ids) for example in examples]
        self.units = [[i] for i in range(len(examples))] if room is None else packs(lengths, room)

    def __len__(self) -> int:
        return len(self.units)

    def batch(self, units: Sequence[int]) -> Batch:
        rows = [[self.examples[i] for i in self.units[unit]] for unit in units]
        if self._joins(units):
            return packed([[example for row in rows for example in row]], self.pad)
        return packed(rows, self.pad) if self.packed else padded([row[0] for row in rows], self.pad)

    def items(self, batch: Batch) -> int:
        return int((targets(batch) != IGNORED_LABEL).sum())

    def loss(self, model: Any, batch: Batch, num_items: int) -> Tensor:
        return model(**batch, num_items_in_batch=num_items, loss_chunk_size=self.chunk, use_cache=False).loss

    def where(self, units: Sequence[int]) -> list[str]:
        return [self.examples[i].where for unit in units for i in self.units[unit]]

    def length(self, unit: int) -> int:
        return sum(len(self.examples[i].ids) for i in self.units[unit])

    def tokens(self, units: Sequence[int]) -> int:
        lengths = [self.length(unit) for unit in units]
        return sum(lengths) if self._joins(units) else len(lengths) * max(lengths)

    def _joins(self, units: Sequence[int]) -> bool:
        lengths = [len(self.examples[i].ids) for unit in units for i in self.units[unit]]
        return len(units) > 1 and max(lengths) <= self.joined and segments_pay(len(lengths), sum(lengths))


class Preferences:
    """DPO (arXiv:2305.18290) against the log probabilities of a reference, or ORPO (arXiv:2403.07691), which has none.

    reference: (pairs, 2), the log probability of each chosen and rejected answer; None for ORPO.
    """

    def __init__(self, pairs: Sequence[Pair], pad: int, chunk: int, beta: float, reference: Tensor | None):
        self.pairs, self.pad, self.chunk, self.beta, self.reference = pairs, pad, chunk, beta, reference

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, units: Sequence[int]) -> Batch:
        chosen, rejected = ([getattr(self.pairs[u], side) for u in units] for side in ("chosen", "rejected"))
        batch = padded([*chosen, *rejected], self.pad)
        return batch if self.reference is None else {**batch, "reference": self.reference[list(units)]}

    def items(self, batch: Batch) -> int:
        return len(batch["input_ids"]) // 2

    def loss(self, model: Any, batch: Batch, num_items: int) -> Tensor:
        reference = batch.get("reference")
        said, counts = answer_logprobs(model, batch, self.chunk)
        chosen, rejected = said.chunk(2)
        if reference is not None:
            gain = (chosen - rejected) - (reference[:, 0] - reference[:, 1])
            return -F.logsigmoid(self.beta * gain).sum() / num_items
        chosen_mean, rejected_mean = (said / counts).chunk(2)
        odds = (chosen_mean - rejected_mean) - (_log1mexp(chosen_mean) - _log1mexp(rejected_mean))
        return (-chosen_mean - self.beta * F.logsigmoid(odds)).sum() / num_items

    def where(self, units: Sequence[int]) -> list[str]:
        return [self.pairs[unit].where for unit in units]

    def length(self, unit: int) -> int:
        return len(self.pairs[unit].chosen.ids) + len(self.pairs[unit].rejected.ids)

    def tokens(self, units: Sequence[int]) -> int:
        rows = [example.ids for unit in units for example in (self.pairs[unit].chosen, self.pairs[unit].rejected)]
        return len(rows) * max(map(len, rows))


def answer_logprobs(model: Any, batch: Batch, chunk: int) -> tuple[Tensor, Tensor]:
    """The log probability of what each row learns, and of how many tokens it is: two tensors (B,)."""
    wanted = targets(batch)
    hidden = model.model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
    found = row_logprobs(model.lm_head, hidden, wanted, chunk, model.config.final_logit_softcapping)
    return found, (wanted != IGNORED_LABEL).sum(1)


@torch.no_grad()
def reference_logprobs(model: Any, pairs: Sequence[Pair], pad: int, chunk: int) -> Tensor:
    """(pairs, 2): what the model gives each answer before it is trained, a pair a pass: no batch decides bits."""
    plain = Preferences(pairs, pad, chunk, 1.0, None)
    device = model.device
    rows = []
    for unit in range(len(pairs)):
        batch = {name: tensor.to(device) for name, tensor in plain.batch([unit]).items()}
        rows.append(answer_logprobs(model, batch, chunk)[0])
    return torch.stack(rows)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0."""
    return torch.log1p(-torch.exp(x.clamp_max(-1e-6)))
