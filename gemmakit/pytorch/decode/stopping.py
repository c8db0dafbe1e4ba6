"""What ends a row besides eos and the token limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.token_bytes import Tokenizer, token_table

# ids (B, n) and scores (B, V) -> bool (B,) or one bool for all rows
Criterion = Callable[[Tensor, Tensor], Any]
Decoder = Tokenizer

# Why a row ends: by an end token, by a stop string or criterion, by its length or time. The first: it goes on.
REASONS = (None, "eos", "stop", "length")


@dataclass(frozen=True)
class MaxTime:
    """All rows end after `seconds`."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def __call__(self, ids: Tensor, scores: Tensor) -> bool:
        return time.monotonic() - self.start > self.seconds


@dataclass(frozen=True)
class StopStrings:
    """A row ends when its last token completes one of the texts, wherever the bytes fall among the tokens.

    texts: as UTF-8. table: the bytes of each token. A text that the prompt completed ends nothing; one that began there
    does. Bytes are compared, so a character of several byte tokens is found like any other.
    """

    texts: Sequence[bytes]
    table: Sequence[bytes]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        window = max(len(text) for text in self.texts)  # every token adds a byte at least
        done = [self._ends(row) for row in ids[:, -window:].tolist()]
        return torch.tensor(done, device=ids.device)

    def _ends(self, row: Sequence[int]) -> bool:
        text = b"".join(self.table[token] for token in row)
        before = len(text) - len(self.table[row[-1]])
        # Only a match that ends within the last token's bytes is new.
        return any(text.find(t, max(0, before - len(t) + 1)) >= 0 for t in self.texts)


def build(
    config: GenerationConfig, tokenizer: Tokenizer | None, custom: Sequence[Criterion], vocabulary: int | None = None
) -> list[Criterion]:
    """The criteria that the settings ask for, after the caller's own."""
    criteria: list[Criterion] = list(custom)
    if config.max_time is not None:
        criteria.append(MaxTime(config.max_time))
    if config.stop_texts:
        if tokenizer is None:
            raise InputError("stop_strings are compared as text: pass the tokenizer too, generate(..., tokenizer=...).")
        size = vocabulary or max(tokenizer.get_vocab().values()) + 1
        table, _ = token_table(tokenizer, size)
        criteria.append(StopStrings([text.encode() for text in config.stop_texts], table))
    return criteria


def refuse_clocks(model: Any, config: GenerationConfig, criteria: Sequence[Criterion]) -> None:
    """Raises InputError where several processes share the model and the time would end its rows."""
    if getattr(model, "tensor_parallel", None) is None:
        return
    given = [("max_time", config), *((type(criterion).__name__, criterion) for criterion in criteria)]
    for name, held in given:
        seconds = held.seconds if isinstance(held, MaxTime) else getattr(held, "max_time", None)
        if seconds is not None:
            raise InputError(
                f"{name} is {seconds}, but several processes share the model, and each has a clock of its own: leave "
                "it out, or give max_new_tokens."
            )


def reasons(criteria: Sequence[Criterion], ids: Tensor, scores: Tensor, eos: Tensor) -> Tensor:
    """int64 (B,), indices of REASONS: the first reason for each row to end. eos: bool (B,), its last token is one."""
    found = eos.long()
    for criterion in criteria:
        ends = torch.as_tensor(criterion(ids, scores), device=ids.device).to(torch.bool)
        found = torch.where((found == 0) & ends, REASONS.index(_reason(criterion)), found)
    return found


def first_reason(criteria: Sequence[Criterion], ids: Tensor, scores: Tensor) -> str | None:
    """The same for a lone row on the host, that of no eos; criteria after the one that ends it are not asked."""
    for criterion in criteria:
        if bool(torch.as_tensor(criterion(ids, scores), device="cpu").all()):
            return _reason(criterion)
    return None


def _reason(criterion: Criterion) -> str:
    return "length" if isinstance(criterion, MaxTime) else "stop"
