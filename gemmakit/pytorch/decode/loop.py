"""The token loop: greedy, sampled and streamed decoding, over any cache.

Axis letters: R rows (prompts times their copies).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.decode.captured import boarding
from gemmakit.pytorch.decode.plan import Mail, Plan, refuse_no_token
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.rows import Rows


class Run:
    """The state of one decoding: the rows, which of them are over, and what the host has been told."""

    def __init__(self, model: Any, prompt: Prompt, plan: Plan):
        record = plan.record
        wanted = {n: getattr(record, n) is not None for n in ("attentions", "hidden_states")}
        self.rows = Rows(model, prompt, plan.total, plan.pad, **wanted)
        self.plan = plan
        self.first = self.rows.length
        self.delivered = 0
        self.latest: list[int] = []  # the tokens delivered last, one a row
        self.mail = Mail(self.rows.device)
        self.ends = torch.zeros(len(prompt.ids) * plan.copies, dtype=torch.long, device=self.rows.device)

    def open(self) -> None:
        if self.plan.streamer is not None and self.first:
            self.plan.streamer.put(self.rows.ids.cpu())

    def next(self) -> None:
        """The plain step: run the newest tokens, choose the next ones."""
        self.choose(self.rows.next())

    def choose(self, out: Any) -> None:
        """Pick the next token of each row, write it down and send it off."""
        logits = out.logits[:, -1]
        token, scores = self.plan.choose(self.rows.ids, logits)
        self.plan.record.step(out, logits, scores)
        self.put(token, scores)

    def put(self, token: Tensor, scores: Tensor) -> None:
        """token: (R,), NO_TOKEN where there was none to choose."""
        token, self.ends = self.plan.append(self.rows, token, scores, self.ends)
        self.mail.send(token, self.ends)

    def deliver(self) -> bool:
        """Check and stream what has arrived; whether all rows are over."""
        last = self.rows.length == self.plan.total
        for message in self.mail.read(flush=last):
            tokens, ends = message[: len(self.ends)], message[len(self.ends) :]
            self.delivered += 1
            refuse_no_token(tokens, self.delivered)
            self.latest = tokens
            if self.plan.streamer is not None:
                self.plan.streamer.put(torch.tensor(tokens, device="cpu"))
            if all(ends):
                return True
        return last

    def output(self) -> GenerateDecoderOnlyOutput:
        """(R, P + new) sequences, rows that ended early filled with pad; a step that came too late is left out."""
        end = self.first + self.delivered
        if self.rows.length > end and self.rows.cache is not None:
            self.rows.cache.crop(end - self.rows.length)
        sequences = self.rows.buffer[:, :end]
        kept = self.plan.record.kept(self.delivered)
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=self.rows.cache, **kept)


def decode(model: Any, prompt: Prompt, plan: Plan) -> GenerateDecoderOnlyOutput:
    """Run the loop to the end: one token a row and step, picked by `plan.pick`; a step is run, or replayed."""
    with boarding(model, prompt, plan) as fixed:
        run = Run(model, prompt if fixed is None else fixed.host(prompt, plan.copies), plan)
        run.open()
        run.choose(run.rows.prefill(plan.copies, plan.config.prefill_chunk_size))
        step = run if fixed is None else fixed.board(run)
        while not run.deliver():
            step.next()
        if fixed is not None:
            fixed.land(run, prompt.cache if plan.config.return_dict_in_generate else None)
        return run.output()
