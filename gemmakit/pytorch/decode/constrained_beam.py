"""Constrained beam search: beams that bring required phrases further are kept beside the likeliest ones.

Each step's candidates are the likeliest continuations and every token that a phrase needs next. They are sorted into
banks by how far they are, and the beams take turns through the banks. Source: arXiv:1804.06609 (dynamic beam
allocation). Axis letters: B prompts, n beams a prompt, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import TokenOutOfRange
from gemmakit.generation.constraints import Constraint, Progress, from_words
from gemmakit.outputs import GenerateBeamDecoderOnlyOutput
from gemmakit.pytorch.decode.beam import UNLIKELY, Beams, Hypotheses, Search
from gemmakit.pytorch.decode.plan import Plan
from gemmakit.pytorch.decode.prompt import Prompt

# Weight of one step of progress against log probabilities when candidates are sorted.
BANK = 100.0


@dataclass(frozen=True)
class Next:
    """A beam, a token after it, the score of both, and how far they are together."""

    beam: int
    token: int
    score: float
    progress: Progress


class ConstrainedBeams(Beams):
    """Beams that know their progress; it is kept on the host, so every step waits for the device once."""

    def __init__(self, prompt: Tensor, total: int, beams: int, plan: Plan, constraints: list[Constraint]):
        super().__init__(prompt, total, beams, plan)
        self.longest = max(c.longest for c in constraints)
        start = Progress(tuple(constraints))
        self.texts: list[list[tuple[int, ...]]] = [[()] * beams for _ in prompt]  # new tokens of each beam
        self.progress = [[start.through(row)] * beams for row in prompt.tolist()]

    def advance(self, logprobs: Tensor, place: int) -> tuple[Tensor, Tensor]:
        totals = logprobs + self.running.scores[..., None]
        usable = self.usable(totals)
        candidates = self.extend(totals, place)
        candidates.ended = self._by_eos(candidates.ids[:, :, place])
        length = place + 1 - self.prompt_length
        self._offer_complete(candidates, length, place)
        nexts = self._allocate(candidates, totals, place)
        self._follow(nexts, place)
        self.reconsider(candidates.scores.amax(-1, keepdim=True), length)
        ids = self.running.ids[:, :, : place + 1].flatten(0, 1)
        stopped = self.plan.ended(ids, logprobs.flatten(0, 1)).all() if self.plan.criteria else False
        if place + 1 == self.running.ids.shape[-1] or bool(stopped):
            self._offer_rest(length)
            return usable, torch.zeros_like(self.open.any())
        return usable, self.open.any()

    def _by_eos(self, tokens: Tensor) -> Tensor:
        if self.plan.eos is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return torch.isin(tokens, self.plan.eos)

    def _offer_complete(self, candidates: Hypotheses, length: int, place: int) -> None:
        """What ended among the first n candidates, if it holds all phrases."""
        parents = (candidates.parents[:, :, place - self.prompt_length] - self.rows)[:, : self.size]
        complete = torch.tensor([[p.complete for p in row] for row in self.progress], device=parents.device)
        eligible = torch.zeros_like(candidates.ended)
        eligible[:, : self.size] = candidates.ended[:, : self.size] & complete.gather(1, parents)
        self.offer(candidates, eligible, length)

    def _allocate(self, candidates: Hypotheses, totals: Tensor, place: int) -> list[list[Next]]:
        """The n beams of each prompt that run on."""
        needed = [
            [(beam, token) for beam, progress in enumerate(row) for token in dict.fromkeys(progress.next())]
            for row in self.progress
        ]
        flat = [(b, beam, token) for b, row in enumerate(needed) for beam, token in row]
        at = torch.tensor(flat, dtype=torch.long, device=totals.device).view(-1, 3).unbind(1)
        scores = iter(totals[at].tolist())
        parents = (candidates.parents[:, :, place - self.prompt_length] - self.rows).tolist()
        likely = zip(parents, candidates.ids[:, :, place].tolist(), candidates.scores.tolist(), strict=True)
        ended = candidates.ended.tolist()
        out = []
        for b, row in enumerate(likely):
            best = [self._next(b, *one) for one, over in zip(zip(*row, strict=True), ended[b], strict=True) if not over]
            chosen = best[: self.size]
            seen = {(self.texts[b][x.beam], x.token) for x in chosen}
            for beam, token in needed[b]:
                score = next(scores)
                if (self.texts[b][beam], token) not in seen:  # beams may still hold the same text
                    seen.add((self.texts[b][beam], token))
                    chosen.append(self._next(b, beam, token, score))
            out.append(self._in_turns(chosen))
        return out

    def _next(self, b: int, beam: int, token: int, score: float) -> Next:
        return Next(beam, token, score, self.progress[b][beam].after(token))

    def _in_turns(self, candidates: list[Next]) -> list[Next]:
        """The best of every bank, the furthest bank first, then the second best of every bank, and so on."""
        if len(candidates) == self.size:
            return candidates
        banks = [x.progress.bank(self.longest) for x in candidates]
        order = sorted(range(len(candidates)), key=lambda i: -(banks[i] * BANK + candidates[i].score))
        turns, count, bank = [], -1, None
        for i in order:
            count = count + 1 if banks[i] == bank else 0
            bank = banks[i]
            turns.append((count, candidates[i]))
        return [x for _, x in sorted(turns, key=lambda turn: turn[0])][: self.size]

    def _follow(self, nexts: list[list[Next]], place: int) -> None:
        device = self.open.device
        beam = torch.tensor([[x.beam for x in row] for row in nexts], device=device)
        self.running = self.running.take(beam)
        self.running.ids[:, :, place] = torch.tensor([[x.token for x in row] for row in nexts], device=device)
        self.running.scores = torch.tensor(
            [[x.score for x in row] for row in nexts], dtype=torch.float32, device=device
        )
        self.running.parents[:, :, place - self.prompt_length] = beam + self.rows
        self.texts = [[(*self.texts[b][x.beam], x.token) for x in row] for b, row in enumerate(nexts)]
        self.progress = [[x.progress for x in row] for row in nexts]

    def _offer_rest(self, length: int) -> None:
        """At the end the running beams that hold all phrases count; others only where there are too few of those."""
        complete = torch.tensor([[p.complete for p in row] for row in self.progress], device=self.open.device)
        self.offer(self.running, complete, length)
        enough = self.finished.ended.sum(-1, keepdim=True) >= self.plan.config.num_return_sequences
        lacking = ~complete & ~enough & self.open
        scores = torch.where(lacking, self.running.scores / length**self.plan.config.length_penalty, float("-inf"))
        rest = Hypotheses(self.running.ids, scores, self.running.parents, lacking)
        late = torch.cat((torch.zeros_like(self.finished.scores), lacking.float() * UNLIKELY / 2), dim=1)
        both = self.finished + rest
        # In float64 a score keeps its digits beside the handicap.
        self.finished = both.take((both.scores.double() + late).topk(self.size).indices)


def constrained_beam_search(model: Any, prompt: Prompt, plan: Plan) -> GenerateBeamDecoderOnlyOutput:
    """Beam search whose results hold every phrase of `constraints` or `force_words_ids`, if a beam can get there."""
    search = Search(model, prompt, plan)
    constraints = _constraints(plan, model.config.vocab_size)
    beams = ConstrainedBeams(prompt.ids, plan.total, plan.copies, plan, constraints)
    out = search.rows.prefill(plan.copies, plan.config.prefill_chunk_size)
    while True:
        beams.open = beams.open & search.going  # a step behind the end changes nothing
        usable, going = beams.advance(search.logprobs(out), search.rows.length)
        search.move(beams.running, usable, going)
        if search.over():
            return search.output(beams.finished)
        out = search.rows.next()


def _constraints(plan: Plan, vocabulary: int) -> list[Constraint]:
    config = plan.config
    constraints = list(config.constraints or ()) + from_words(config.force_words_ids or ())
    for token in (t for c in constraints for phrase in c.phrases for t in phrase):
        if token >= vocabulary:
            raise TokenOutOfRange(
                f"a constraint holds the token id {token}, which is outside the vocabulary of {vocabulary} ids."
            )
    return constraints
