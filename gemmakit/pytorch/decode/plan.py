"""How to decode: what every strategy is told besides the model and the prompt, and what it tells the host.

Axis letters: R rows (prompts times their copies), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gemmakit.errors import NumericalError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.sampling import NO_TOKEN, Exponential
from gemmakit.pytorch.decode.step import Step, StepOutputs


class Streamer(Protocol):
    """Takes the prompt's ids once, then each new token, then the end."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(kw_only=True)
class Plan(Step):
    """A call's steps, and what strategies ask beside."""

    config: GenerationConfig
    total: int  # tokens a row may have, prompt included
    noise: Exponential
    copies: int = 1  # rows a prompt
    streamer: Streamer | None = None
    assistant: Any = None
    record: StepOutputs = field(default_factory=StepOutputs)


class Ends:
    """All of a plan's ways to end as one criterion, for decoding functions of the caller's own."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self.max_length = plan.total

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """ids: (R, n) -> bool (R,)."""
        return self._plan.ended(ids, scores) | (ids.shape[1] >= self.max_length)


class Letter:
    """Whole numbers on their way to the host: sent without waiting, read when they are needed."""

    def __init__(self, content: Tensor):
        """content: int64 (n,), on any device; it may be written over afterwards."""
        self._event = None
        if content.device.type == "cuda":
            self._content = content.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(content.device))
        else:
            self._content = content.clone()

    def read(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._content.tolist()


class Mail:
    """Carries each step's tokens, and what else it tells, to the host.

    On the CPU they are there at once. From an accelerator they are read one step later, while the next step already
    runs: a loop never waits for the step it has just started.
    """

    def __init__(self, device: torch.device):
        self.lag = int(device.type == "cuda")
        self._sent: list[Letter] = []

    def send(self, *message: Tensor) -> None:
        """Whole numbers (n,) each, sent end to end. They may change afterwards."""
        self._sent.append(Letter(message[0] if len(message) == 1 else torch.cat(message)))

    def read(self, flush: bool = False) -> list[list[int]]:
        """The messages of the steps that have arrived; with `flush`, all that were sent."""
        out = []
        while len(self._sent) > (0 if flush else self.lag):
            out.append(self._sent.pop(0).read())
        return out


def refuse_no_token(tokens: Sequence[int], step: int) -> None:
    """Raises NumericalError when a row of step `step` (from 1) had no token to choose."""
    if NO_TOKEN in tokens:
        raise NumericalError(
            f"step {step}, row {tokens.index(NO_TOKEN)}: no token has a finite score (NaN or infinity in the weights "
            "or logits, or every token forbidden). Check weights and processors, or use float32."
        )
