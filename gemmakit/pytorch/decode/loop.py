"""The token loop: greedy, sampled and streamed decoding, over any cache.

Axis letters: B batch, P prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gemmakit.errors import NumericalError
from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.cache import Cache
from gemmakit.pytorch.decode.processors import Processor
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.sampling import NO_TOKEN, Pick
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
        for kept, value in (
            (self.scores, scores),
            (self.logits, logits),
            (self.attentions, out.attentions),
            (self.hidden_states, out.hidden_states),
        ):
            if kept is not None:
                kept.append(value)

    def output(self, sequences: Tensor, steps: int, cache: Cache | None) -> GenerateDecoderOnlyOutput:
        kept = {n: None if v is None else tuple(v[:steps]) for n, v in vars(self).items()}
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache, **kept)


@dataclass
class Plan:
    """How to decode: everything the loop needs besides the model and the prompt."""

    total: int  # tokens a row may have, prompt included
    pick: Pick
    processors: Sequence[Processor]
    criteria: Sequence[Criterion]
    eos: Tensor | None
    pad: int
    streamer: Streamer | None
    chunk: int | None = None  # prompt tokens a forward pass
    record: Recorder = field(default_factory=Recorder)


class Mail:
    """Carries each step's tokens and whether all rows are done to the host.

    On the CPU they are there at once. From an accelerator they are read one step later, while the next step already
    runs: the loop never waits for the step it has just started.
    """

    def __init__(self, device: torch.device):
        self.lag = int(device.type == "cuda")
        self._sent: list[tuple[Tensor, Any]] = []

    def send(self, token: Tensor, done: Tensor) -> None:
        content = torch.cat((token, done.all().to(token.dtype)[None]))
        if not self.lag:
            self._sent.append((content, None))
            return
        host = content.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent.append((host, event))

    def read(self, flush: bool = False) -> list[tuple[list[int], bool]]:
        """(tokens a row, all done) of the steps that have arrived; with `flush`, of all that were sent."""
        out = []
        while len(self._sent) > (0 if flush else self.lag):
            content, event = self._sent.pop(0)
            if event is not None:
                event.synchronize()
            *tokens, done = content.tolist()
            out.append((tokens, bool(done)))
        return out


class Run:
    """The state of one decoding: token buffer, visibility, places, and which rows are done."""

    def __init__(self, model: Any, prompt: Prompt, plan: Plan):
        self.model, self.prompt, self.plan = model, prompt, plan
        B, P = prompt.ids.shape
        self.device = prompt.ids.device
        self.buffer = torch.full((B, plan.total), plan.pad, dtype=torch.long, device=self.device)
        self.buffer[:, :P] = prompt.ids
        self.length = P
        self.done = torch.zeros(B, dtype=torch.bool, device=self.device)
        self.delivered = 0
        self._mask = self._positions = None
        if prompt.mask is not None:
            room = prompt.mask.shape[1] + plan.total - P
            self._mask = torch.ones((B, room), dtype=torch.bool, device=self.device)
            self._mask[:, : prompt.mask.shape[1]] = prompt.mask
            self._positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        self._offset = 0 if prompt.mask is None else prompt.mask.shape[1] - P

    @property
    def ids(self) -> Tensor:
        """(B, n): prompt and new tokens so far."""
        return self.buffer[:, : self.length]

    def forward(self, start: int, end: int, embeds: Tensor | None = None) -> Any:
        """Run tokens start..end of the buffer (or `embeds` in their place); logits of the last one only."""
        seen = end + self._offset
        count = end - start if embeds is None else embeds.shape[1]
        record = self.plan.record
        return self.model(
            input_ids=None if embeds is not None else self.buffer[:, start:end],
            inputs_embeds=embeds,
            attention_mask=None if self._mask is None else self._mask[:, :seen],
            position_ids=None if self._positions is None else self._positions[:, seen - count : seen],
            past_key_values=self.prompt.cache,
            use_cache=self.prompt.cache is not None,
            output_attentions=record.attentions is not None,
            output_hidden_states=record.hidden_states is not None,
            return_dict=True,
            logits_to_keep=1,
        )

    def prefill(self) -> Any:
        start, end = self.prompt.past, self.length
        chunk = self.plan.chunk
        if self.prompt.embeds is not None:
            return self.forward(start, end, self.prompt.embeds)
        while chunk is not None and self.prompt.cache is not None and end - start > chunk:
            self.forward(start, start + chunk)
            start += chunk
        return self.forward(start, end)

    def next(self) -> Any:
        return self.forward(0 if self.prompt.cache is None else self.length - 1, self.length)

    def choose(self, out: Any) -> None:
        """Pick the next token of each row and write it down."""
        plan = self.plan
        logits = out.logits[:, -1].float()
        scores = logits
        for processor in plan.processors:
            scores = processor(self.ids, scores)
        plan.record.step(out, logits, scores)
        token = plan.pick(scores)
        self.token = torch.where(self.done, plan.pad, token)
        self.buffer[:, self.length] = self.token.clamp_min(0)
        self.length += 1
        if plan.eos is not None:
            self.done |= torch.isin(token, plan.eos)
        for criterion in plan.criteria:
            self.done |= torch.as_tensor(criterion(self.ids, scores), device=self.device)

    def deliver(self, mail: Mail, flush: bool = False) -> bool:
        """Check and stream what has arrived; whether all rows are done."""
        for tokens, done in mail.read(flush):
            step = self.delivered
            self.delivered += 1
            if NO_TOKEN in tokens:
                raise NumericalError(
                    f"step {step + 1}, row {tokens.index(NO_TOKEN)}: no token has a finite score (NaN or infinity "
                    "in the weights or logits, or every token forbidden). Check weights and processors, or use float32."
                )
            if self.plan.streamer is not None:
                self.plan.streamer.put(torch.tensor(tokens))
            if done:
                return True
        return False


def decode(model: Any, prompt: Prompt, plan: Plan) -> GenerateDecoderOnlyOutput:
    """Run the loop to the end. The sequences are (B, P + new), rows that ended early filled with pad."""
    run = Run(model, prompt, plan)
    first = run.length
    mail = Mail(run.device)
    if plan.streamer is not None and first:
        plan.streamer.put(run.ids.cpu())
    try:
        out = run.prefill()
        while True:
            run.choose(out)
            mail.send(run.token, run.done)
            last = run.length == plan.total
            if run.deliver(mail, flush=last) or last:
                break
            out = run.next()
    finally:
        if plan.streamer is not None:
            plan.streamer.end()
    sequences = run.buffer[:, : first + run.delivered]
    return plan.record.output(sequences, run.delivered, prompt.cache)
