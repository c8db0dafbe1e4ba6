"""Beam search and beam sampling: the most probable continuations instead of the most probable next token.

Axis letters: B prompts, n beams a prompt, K candidates a prompt, V vocabulary, T places of a row.
Scores are sums of log probabilities; what has ended is compared by sum / length ** length_penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmakit.outputs import GenerateBeamDecoderOnlyOutput
from gemmakit.pytorch.decode.plan import Mail, Plan, refuse_no_token
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.rows import Rows
from gemmakit.pytorch.decode.sampling import NO_TOKEN

# Below every real score, yet finite: sums and comparisons stay free of NaN.
UNLIKELY = -1.0e9


@dataclass
class Hypotheses:
    """Some continuations of each prompt.

    ids: (B, n, T). scores: float32 (B, n), the best first in what has finished. parents: (B, n, new), the row each new
    token came from, -1 where there is none yet. ended: bool (B, n).
    """

    ids: Tensor
    scores: Tensor
    parents: Tensor
    ended: Tensor

    def take(self, index: Tensor) -> Hypotheses:
        """index: (B, m) -> the m of each prompt that it names."""
        return Hypotheses(
            _pick(self.ids, index), _pick(self.scores, index), _pick(self.parents, index), _pick(self.ended, index)
        )

    def best(self, count: int) -> Hypotheses:
        return self.take(self.scores.topk(count).indices)

    def __add__(self, other: Hypotheses) -> Hypotheses:
        pairs = ((getattr(self, n), getattr(other, n)) for n in vars(self))
        return Hypotheses(*(torch.cat(pair, dim=1) for pair in pairs))


def _pick(values: Tensor, index: Tensor) -> Tensor:
    index = index.reshape(*index.shape, *(1 for _ in values.shape[2:]))
    return values.gather(1, index.expand(*index.shape[:2], *values.shape[2:]))


class Beams:
    """The beams of each prompt that compete with each other: those that run, and the best of those that ended."""

    def __init__(self, prompt: Tensor, total: int, beams: int, plan: Plan, first: int = 0):
        """prompt: (B, P) ids. first: which of the prompt's rows is the first beam."""
        B, P = prompt.shape
        device = prompt.device
        self.plan, self.size, self.prompt_length = plan, beams, P
        ids = torch.full((B, beams, total), plan.pad, dtype=torch.long, device=device)
        ids[:, :, :P] = prompt[:, None]
        scores = torch.full((B, beams), UNLIKELY, dtype=torch.float32, device=device)
        none = torch.full((B, beams, total - P), -1, dtype=torch.long, device=device)
        self.finished = Hypotheses(ids, scores, none, torch.zeros((B, beams), dtype=torch.bool, device=device))
        # All beams begin equal: only the first may speak, or all would say the same.
        start = scores.clone()
        start[:, 0] = 0.0
        self.running = Hypotheses(ids.clone(), start, none.clone(), self.finished.ended.clone())
        self.open = torch.ones((B, 1), dtype=torch.bool, device=device)
        self.rows = torch.arange(B, device=device)[:, None] * plan.copies + first  # (B, 1): each prompt's first row

    def extend(self, totals: Tensor, place: int) -> Hypotheses:
        """The likeliest K continuations by one token, or K drawn ones. totals: scores (B, n, V); place: of the token.

        K leaves n that run on even if every beam's best tokens end it.
        """
        vocabulary, totals = totals.shape[-1], totals.flatten(1)
        eos = 0 if self.plan.eos is None else len(self.plan.eos)
        count = min(max(2, 1 + eos) * self.size, totals.shape[1])
        scores, flat = self._draw(totals, count) if self.plan.config.do_sample else totals.topk(count)
        beam, token = flat // vocabulary, flat % vocabulary
        out = self.running.take(beam)
        out.scores = scores
        out.ids[:, :, place] = token
        out.parents[:, :, place - self.prompt_length] = beam + self.rows
        return out

    def _draw(self, totals: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Without replacement, in the order drawn. Source: the exponential race, as in arXiv:1903.06059."""
        probabilities = totals.softmax(-1)
        index = (probabilities / self.plan.noise(probabilities)).topk(count).indices
        return totals.gather(1, index), index

    def usable(self, totals: Tensor) -> Tensor:
        """bool (B,): whether there is a number to choose by, or, all tokens forbidden, at least something ended."""
        best = totals.flatten(1).amax(-1)  # NaN if anything is
        return best.isfinite() | ((best == float("-inf")) & self.finished.ended.any(-1))

    def run_on(self, candidates: Hypotheses) -> None:
        """The best candidates that have not ended are the beams of the next step."""
        scores = candidates.scores + candidates.ended.float() * UNLIKELY
        index = scores.topk(self.size).indices
        self.running = candidates.take(index)
        self.running.scores = scores.gather(1, index)

    def offer(self, candidates: Hypotheses, eligible: Tensor, length: int) -> None:
        """Let candidates of `length` new tokens in among the finished ones. eligible: bool (B, K)."""
        eligible = eligible & self.open
        scores = candidates.scores / length**self.plan.config.length_penalty
        offered = Hypotheses(candidates.ids, torch.where(eligible, scores, float("-inf")), candidates.parents, eligible)
        self.finished = (self.finished + offered).best(self.size)

    def reconsider(self, hope: Tensor, length: int) -> None:
        """Close the prompts whose finished hypotheses no running one can beat any more. hope: (B, 1), the best score.

        early_stopping="never" counts with the longest hypothesis that may come, False with the present length; True
        does not ask, once there are as many as beams.
        """
        config = self.plan.config
        if config.early_stopping is True:
            self.open = self.open & ~self.finished.ended.all(-1, keepdim=True)
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = self.finished.ids.shape[-1] - self.prompt_length
        worst = torch.where(self.finished.ended, self.finished.scores.amin(-1, keepdim=True), UNLIKELY)
        self.open = self.open & (hope / length**config.length_penalty > worst).any(-1, keepdim=True)

    def advance(self, logprobs: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """One step with the token at `place`. logprobs: (B, n, V).

        Returns whether each prompt had something to choose, bool (B,), and whether any beam may still go on, one bool.
        """
        totals = logprobs + self.running.scores[..., None]
        usable = self.usable(totals)
        candidates = self.extend(totals, place)
        candidates.ended = self._ended(candidates, logprobs, place)
        self.run_on(candidates)
        length = place + 1 - self.prompt_length
        if place + 1 == candidates.ids.shape[-1]:
            candidates.ended = torch.ones_like(candidates.ended)
        # The candidates after the first n are there as a reserve of beams that run on.
        first = torch.arange(candidates.ended.shape[1], device=logprobs.device) < self.size
        self.offer(candidates, candidates.ended & first, length)
        self.reconsider(self._hope(candidates), length)
        return usable, self.open.any() & ~candidates.ended.all()

    def _hope(self, candidates: Hypotheses) -> Tensor:
        return self.running.scores[:, :1]

    def _ended(self, candidates: Hypotheses, logprobs: Tensor, place: int) -> Tensor:
        """bool (B, K), by eos or by a criterion."""
        scores = logprobs.flatten(0, 1)
        if self.plan.criteria:  # a criterion sees the scores that its row's last token was chosen from
            parents = candidates.parents[:, :, place - self.prompt_length] - self.rows
            scores = _pick(logprobs, parents).flatten(0, 1)
        return self.plan.ended(candidates.ids[:, :, : place + 1].flatten(0, 1), scores).view_as(candidates.ended)


class Search:
    """The rows of all beams, the steps over them, and what the host is told."""

    def __init__(self, model: Any, prompt: Prompt, plan: Plan):
        record = plan.record
        wanted = {n: getattr(record, n) is not None for n in ("attentions", "hidden_states")}
        self.rows = Rows(model, prompt, plan.total, plan.pad, **wanted)
        self.prompts = prompt.ids
        self.plan = plan
        self.mail = Mail(self.rows.device)
        self.going = torch.ones((), dtype=torch.bool, device=self.rows.device)
        self.delivered = 0

    def logprobs(self, out: Any) -> Tensor:
        """(B, n, V) processed log probabilities of the next token."""
        logits = out.logits[:, -1].float()
        logprobs = self.plan.process(self.rows.ids, logits.log_softmax(-1))
        self.plan.record.step(out, logits, logprobs)
        return logprobs.view(len(self.prompts), self.plan.copies, -1)

    def move(self, running: Hypotheses, usable: Tensor, going: Tensor) -> None:
        """Rows, cache and host follow the beams that run on. usable: bool (B,); going: one bool."""
        rows = self.rows
        step = rows.length - self.prompts.shape[1]
        rows.buffer = running.ids.flatten(0, 1)
        if rows.cache is not None:
            rows.cache.reorder_cache(running.parents[:, :, step].flatten())
        rows.length += 1
        self.going = self.going & going
        self.mail.send(torch.where(usable, 0, NO_TOKEN), ~self.going)

    def over(self) -> bool:
        last = self.rows.length == self.plan.total
        for problems, done in self.mail.read(flush=last):
            self.delivered += 1
            refuse_no_token(problems, self.delivered)
            if done:
                return True
        return last

    def output(self, finished: Hypotheses) -> GenerateBeamDecoderOnlyOutput:
        """The first num_return_sequences of each prompt, (B * that, P + longest) with padding after shorter ones."""
        count = torch.arange(self.plan.config.num_return_sequences, device=finished.ids.device)
        best = finished.take(count.expand(len(finished.ids), -1))
        parents = best.parents.flatten(0, 1)
        longest = int((parents >= 0).sum(-1).max())
        if self.rows.cache is not None and self.rows.length - self.prompts.shape[1] > self.delivered:
            self.rows.cache.crop(-1)  # a step that was on its way when the search ended
        return GenerateBeamDecoderOnlyOutput(
            sequences=best.ids.flatten(0, 1)[:, : self.prompts.shape[1] + longest],
            sequences_scores=None if self.plan.record.scores is None else best.scores.flatten(),
            beam_indices=parents[:, :longest],
            past_key_values=self.rows.cache,
            **self.plan.record.kept(self.delivered),
        )


def beam_search(model: Any, prompt: Prompt, plan: Plan) -> GenerateBeamDecoderOnlyOutput:
    """Keep the num_beams best continuations of each prompt, or with do_sample draw them by probability."""
    search = Search(model, prompt, plan)
    rows = search.rows
    beams = Beams(prompt.ids, plan.total, plan.copies, plan)
    out = rows.prefill(plan.copies, plan.config.prefill_chunk_size)
    while True:
        beams.open = beams.open & search.going  # a step behind the end changes nothing
        usable, going = beams.advance(search.logprobs(out), rows.length)
        search.move(beams.running, usable, going)
        if search.over():
            return search.output(beams.finished)
        out = rows.next()
