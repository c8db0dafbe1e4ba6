"""What ends a row besides eos and the token limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig

# ids (B, n) and scores (B, V) -> bool (B,) or one bool for all rows
Criterion = Callable[[Tensor, Tensor], Any]


class Decoder(Protocol):
    """The part of a tokenizer that stop strings need."""

    def decode(self, ids: Any, **kwargs: Any) -> str: ...


@dataclass(frozen=True)
class MaxTime:
    """All rows end after `seconds`."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def __call__(self, ids: Tensor, scores: Tensor) -> bool:
        return time.monotonic() - self.start > self.seconds


@dataclass(frozen=True)
class StopStrings:
    """A row ends when one of the texts is complete, wherever its characters fall among the tokens."""

    texts: Sequence[str]
    tokenizer: Decoder

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        # A token gives at least one byte unless it is special, so this many tokens always hold the longest text.
        window = max(len(t.encode()) for t in self.texts) + 4
        done = [self._ends(row) for row in ids[:, -window:].tolist()]
        return torch.tensor(done, device=ids.device)

    def _ends(self, row: list[int]) -> bool:
        before, now = self._text(row[:-1]), self._text(row)
        # A text that was complete before the last token ended the row then, or belongs to the prompt.
        common = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), len(before))
        return any(now.find(t, max(0, common - len(t) + 1)) >= 0 for t in self.texts)

    def _text(self, row: list[int]) -> str:
        return self.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def build(config: GenerationConfig, tokenizer: Decoder | None, custom: Sequence[Criterion]) -> list[Criterion]:
    criteria: list[Criterion] = list(custom)
    if config.max_time is not None:
        criteria.append(MaxTime(config.max_time))
    if config.stop_texts:
        if tokenizer is None:
            raise InputError("stop_strings are compared as text: pass the tokenizer too, generate(..., tokenizer=...).")
        criteria.append(StopStrings(config.stop_texts, tokenizer))
    return criteria
