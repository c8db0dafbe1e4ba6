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
from gemmakit.pytorch.decode.processors import Processor
from gemmakit.pytorch.decode.sampling import NO_TOKEN, Exponential, Pick
from gemmakit.pytorch.decode.stopping import Criterion


class Streamer(Protocol):
    """Takes the prompt's ids once, then each new token, then the end."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass
class Recorder:
    """What the caller wants to see of each step."""

    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    attentions: list[Any] | None = None
    hidden_states: list[Any] | None = None

    def step(self, out: Any, logits: Tensor, scores: Tensor) -> None:
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if self.attentions is not None:
            self.attentions.append(out.attentions)
        if self.hidden_states is not None:
            self.hidden_states.append(out.hidden_states)

    def kept(self, steps: int) -> dict[str, tuple[Any, ...] | None]:
        """The fields of an output, for its first `steps` tokens."""
        return {n: None if v is None else tuple(v[:steps]) for n, v in vars(self).items()}


@dataclass
class Plan:
    """Everything a strategy needs besides the model and the prompt."""

    config: GenerationConfig
    total: int  # tokens a row may have, prompt included
    pad: int
    eos: Tensor | None
    pick: Pick
    noise: Exponential
    processors: Sequence[Processor] = ()
    criteria: Sequence[Criterion] = ()
    copies: int = 1  # rows a prompt
    streamer: Streamer | None = None
    assistant: Any = None
    record: Recorder = field(default_factory=Recorder)

    def process(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids: (R, n); scores: (R, V) -> (R, V) after all processors, in their order."""
        for processor in self.processors:
            scores = processor(ids, scores)
        return scores

    def ended(self, ids: Tensor, scores: Tensor) -> Tensor:
        """bool (R,): rows whose last token is an eos, or that a criterion ends. scores: (R, V), of that last token."""
        last = ids[:, -1]
        if self.eos is None:
            done = torch.zeros_like(last, dtype=torch.bool)
        else:
            done = last == self.eos if len(self.eos) == 1 else (last[:, None] == self.eos).any(-1)
        for criterion in self.criteria:
            done = done | torch.as_tensor(criterion(ids, scores), device=ids.device)
        return done


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
    """Carries each step's tokens and whether all rows are done to the host.

    On the CPU they are there at once. From an accelerator they are read one step later, while the next step already
    runs: a loop never waits for the step it has just started.
    """

    def __init__(self, device: torch.device):
        self.lag = int(device.type == "cuda")
        self._sent: list[Letter] = []

    def send(self, token: Tensor, done: Tensor) -> None:
        """token: (R,) int64; done: one bool."""
        self.post(torch.cat((token, done.to(token.dtype)[None])))

    def post(self, message: Tensor) -> None:
        """As send, in one tensor: (R + 1,) int64, the tokens and 1 if all rows are done. It may change afterwards."""
        self._sent.append(Letter(message))

    def read(self, flush: bool = False) -> list[tuple[list[int], bool]]:
        """(tokens a row, all done) of the steps that have arrived; with `flush`, of all that were sent."""
        out = []
        while len(self._sent) > (0 if flush else self.lag):
            *tokens, done = self._sent.pop(0).read()
            out.append((tokens, bool(done)))
        return out


def refuse_no_token(tokens: Sequence[int], step: int) -> None:
    """Raises NumericalError when a row of step `step` (from 1) had no token to choose."""
    if NO_TOKEN in tokens:
        raise NumericalError(
            f"step {step}, row {tokens.index(NO_TOKEN)}: no token has a finite score (NaN or infinity in the weights "
            "or logits, or every token forbidden). Check weights and processors, or use float32."
        )
