"""The token loop as a generator: greedy, sampled and streamed decoding, over any cache; and what reaches the host.

Axis letters: R rows (prompts times their copies), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from gemmakit.errors import NumericalError
from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.decode.capture import recorded_step
from gemmakit.pytorch.decode.invariance import steps_alike
from gemmakit.pytorch.decode.prompt import Prompt, Rows
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import NO_TOKEN
from gemmakit.pytorch.decode.step import Plan, StepOutputs
from gemmakit.pytorch.decode.stopping import REASONS
from gemmakit.streamers import StepTokens, Token

Out = TypeVar("Out")
# A strategy yields the tokens of each step as they are certain, and returns what generate() gives.
Steps = Generator[StepTokens, None, Out]


class Streamer(Protocol):
    """Takes the prompt's ids once, then each new token, then the end."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class HostCopy:
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


class HostQueue:
    """Carries each step's tokens, and what else it tells, to the host.

    On the CPU they are there at once. From an accelerator they are read one step later, while the next step already
    runs: a loop never waits for the step it has just started.
    """

    def __init__(self, device: torch.device):
        self.lag = int(device.type == "cuda")
        self._sent: list[HostCopy] = []

    def send(self, *message: Tensor) -> None:
        """Whole numbers (n,) each, sent end to end. They may change afterwards."""
        self._sent.append(HostCopy(message[0] if len(message) == 1 else torch.cat(message)))

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


class Run:
    """The state of one decoding: the rows, which of them are over, and what the host has been told."""

    def __init__(self, model: CausalLM, prompt: Prompt, plan: Plan):
        outputs = plan.outputs
        wanted = {n: getattr(outputs, n) is not None for n in ("attentions", "hidden_states")}
        self.rows = Rows(model, prompt, plan.total, plan.pad, **wanted)
        self.plan = plan
        self.first = self.rows.length
        self.delivered = 0
        self.over = False
        self.queue = HostQueue(self.rows.device)
        self.ends = torch.zeros(len(prompt.ids) * plan.copies, dtype=torch.long, device=self.rows.device)
        self._reasons: list[str | None] = [None] * len(self.ends)

    def prefill(self) -> None:
        """Run the prompt and choose the first tokens."""
        rows = self.rows
        self.choose(rows.prefill(self.plan.copies, self.plan.config.prefill_chunk_size))
        rows.alike = len(self.ends) == 1 and not steps_alike(rows.model).why

    def next(self) -> None:
        """The plain step: run the newest tokens, choose the next ones."""
        self.choose(self.rows.next())

    def choose(self, out: Any) -> None:
        """Pick the next token of each row, write it down and send it off."""
        logits = out.logits[:, -1]
        token, scores = self.plan.choose(self.rows.ids, logits)
        self.plan.outputs.add(out, logits, scores)
        self.put(token, scores)

    def put(self, token: Tensor, scores: Tensor) -> None:
        """token: (R,), NO_TOKEN where there was none to choose."""
        token, self.ends = self.plan.append(self.rows, token, scores, self.ends)
        self.queue.send(token, self.ends)

    def arrived(self) -> Steps[None]:
        """The steps that have reached the host; afterwards `over` says whether all rows are."""
        for message in self.queue.read(flush=self.rows.length == self.plan.total):
            tokens, ends = message[: len(self.ends)], message[len(self.ends) :]
            self.delivered += 1
            refuse_no_token(tokens, self.delivered)
            last = self.first + self.delivered == self.plan.total
            new = [[] if over else [token] for token, over in zip(tokens, self._reasons, strict=True)]
            self._reasons = [REASONS[end] or ("length" if last else None) for end in ends]
            self.over = all(self._reasons)
            yield StepTokens(new, self._reasons)
            if self.over:
                return

    def took(self, tokens: list[int], reason: str | None) -> StepTokens:
        """Several tokens of a lone row at once, which a strategy has put into the rows itself."""
        self.delivered += len(tokens)
        self.over = reason is not None
        return StepTokens([tokens], [reason])

    def settle(self) -> None:
        """Take back a step that came too late: rows and cache then hold what was delivered."""
        late = self.rows.length - (self.first + self.delivered)
        if late > 0 and self.rows.cache is not None:
            self.rows.cache.crop(-late)

    def output(self) -> GenerateDecoderOnlyOutput:
        """(R, P + new) sequences, rows that ended early filled with pad; a step that came too late is left out."""
        self.settle()
        sequences = self.rows.buffer[:, : self.first + self.delivered]
        kept = self.plan.outputs.kept(self.delivered)
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=self.rows.cache, **kept)


def decode(model: CausalLM, prompt: Prompt, plan: Plan) -> Steps[GenerateDecoderOnlyOutput]:
    """One token a row and step, picked by `plan.pick`; a step is run, or replayed."""
    with recorded_step(model, prompt, plan) as static:
        run = Run(model, prompt if static is None else static.host(prompt, plan.copies), plan)
        run.prefill()
        advance = run.next if static is None else static.take_over(run)
        try:
            yield from run.arrived()
            while not run.over:
                advance()
                yield from run.arrived()
        except GeneratorExit:
            if static is None:
                run.settle()
            raise
        if static is not None:
            static.hand_back(run, prompt.cache if plan.config.return_dict_in_generate else None)
        return run.output()


def told(steps: Steps[None], streamer: Streamer, prompt: Tensor) -> Steps[None]:
    """The same steps of one row, each token told to the streamer, and the end however it comes. prompt: (1, P)."""
    try:
        if prompt.shape[1]:
            streamer.put(prompt.cpu())
        with closing(steps):
            for step in steps:
                for token in step.tokens[0]:
                    streamer.put(torch.tensor([token], device="cpu"))
                yield step
    finally:
        streamer.end()


def tokens_of(steps: Steps[None], outputs: StepOutputs, cache: Any) -> Generator[Token]:
    """The tokens of one row, each alone; scores are let go of once they are handed out.

    Whoever leaves in the middle of a step leaves the cache with what was handed out.
    """
    left = 0
    try:
        for step in steps:
            left = len(step.tokens[0])
            for token in step.tokens[0]:
                left -= 1
                yield Token(token, None if left else step.finish_reasons[0], outputs.take_scores())
    except GeneratorExit:
        steps.close()
        if cache is not None and left:
            cache.crop(-left)
        raise
