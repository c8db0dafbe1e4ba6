"""Beam search: the most probable continuations instead of the most probable next token.

One loop for all of it: beams may be drawn instead of taken (do_sample), stand in groups that avoid each other's tokens
(num_beam_groups, arXiv:1610.02424), or have to hold phrases (constraints, force_words_ids, arXiv:1804.06609).

Axis letters: B prompts, n beams that compete, K candidates a prompt, R rows (all beams of all prompts), V vocabulary,
T places of a row. Scores are sums of log probabilities; what has ended is compared by sum / length ** length_penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add, and_, or_
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import TokenOutOfRange
from gemmakit.generation.constraints import Constraint, Progress, from_words
from gemmakit.outputs import GenerateBeamDecoderOnlyOutput
from gemmakit.pytorch.decode.prompt import Prompt, Rows
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import NO_TOKEN
from gemmakit.pytorch.decode.step import Plan
from gemmakit.pytorch.decode.stopping import REASONS
from gemmakit.pytorch.decode.stream import HostQueue, Steps, refuse_no_token
from gemmakit.streamers import StepTokens

# Below every real score, yet finite: sums and comparisons stay free of NaN.
UNLIKELY = -1.0e9
# Weight of one step of progress with phrases against log probabilities, when candidates are sorted.
BANK = 100.0
LENGTH = REASONS.index("length")


@dataclass
class Hypotheses:
    """Some continuations of each prompt.

    ids: (B, n, T). scores: float32 (B, n), the best first in what has finished. parents: (B, n, new), the row each new
    token came from, -1 where there is none yet. ended: int64 (B, n), an index of REASONS, 0 for what did not end.
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

    def __init__(self, prompt: Tensor, plan: Plan, beams: int, first: int = 0):
        """prompt: (B, P) ids. first: which of the prompt's rows is the first beam."""
        B, P = prompt.shape
        device, total = prompt.device, plan.total
        self.plan, self.size, self.prompt_length = plan, beams, P
        self.place = slice(first, first + beams)  # among the rows of a prompt
        ids = torch.full((B, beams, total), plan.pad, dtype=torch.long, device=device)
        ids[:, :, :P] = prompt[:, None]
        scores = torch.full((B, beams), UNLIKELY, dtype=torch.float32, device=device)
        none = torch.full((B, beams, total - P), -1, dtype=torch.long, device=device)
        self.finished = Hypotheses(ids, scores, none, torch.zeros((B, beams), dtype=torch.long, device=device))
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
        scores = candidates.scores + (candidates.ended > 0).float() * UNLIKELY
        index = scores.topk(self.size).indices
        self.running = candidates.take(index)
        self.running.scores = scores.gather(1, index)

    def offer(self, candidates: Hypotheses, eligible: Tensor, length: int) -> None:
        """Let candidates of `length` new tokens in among the finished ones. eligible: bool (B, K)."""
        eligible = eligible & self.open
        scores = candidates.scores / length**self.plan.config.length_penalty
        scores = torch.where(eligible, scores, float("-inf"))
        offered = Hypotheses(candidates.ids, scores, candidates.parents, candidates.ended * eligible)
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
        worst = torch.where(self.finished.ended > 0, self.finished.scores.amin(-1, keepdim=True), UNLIKELY)
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
            candidates.ended = _at_last(candidates.ended)
        # The candidates after the first n are there as a reserve of beams that run on.
        first = torch.arange(candidates.ended.shape[1], device=logprobs.device) < self.size
        self.offer(candidates, (candidates.ended > 0) & first, length)
        self.reconsider(self._hope(candidates), length)
        return usable, self.open.any() & ~candidates.ended.all()

    def _hope(self, candidates: Hypotheses) -> Tensor:
        """(B, 1). Groups judge by what has just ended too, as the search of transformers 4.46 did."""
        alone = self.size == self.plan.copies
        return self.running.scores[:, :1] if alone else candidates.scores.amax(-1, keepdim=True)

    def _ended(self, candidates: Hypotheses, logprobs: Tensor, place: int) -> Tensor:
        """int64 (B, K), by eos or by a criterion."""
        scores = logprobs.flatten(0, 1)
        if self.plan.criteria:  # a criterion sees the scores that its row's last token was chosen from
            parents = candidates.parents[:, :, place - self.prompt_length] - self.rows
            scores = _pick(logprobs, parents).flatten(0, 1)
        return self.plan.ends(candidates.ids[:, :, : place + 1].flatten(0, 1), scores).view_as(candidates.ended).long()


def _at_last(ended: Tensor) -> Tensor:
    """What has not ended yet ends by its length."""
    return torch.where(ended > 0, ended, LENGTH)


@dataclass(frozen=True)
class Next:
    """A beam, a token after it, the score of both, and how far they are together."""

    beam: int
    token: int
    score: float
    progress: Progress


class ConstrainedBeams(Beams):
    """Beams that bring required phrases further are kept beside the likeliest ones (dynamic beam allocation).

    Candidates are the likeliest continuations and every token that a phrase needs next; sorted into banks by how far
    they are, they take turns. Progress is kept on the host, so every step waits for the device once.
    """

    def __init__(self, prompt: Tensor, plan: Plan, beams: int, constraints: list[Constraint]):
        super().__init__(prompt, plan, beams)
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
        if self.plan.criteria:
            ids = self.running.ids[:, :, : place + 1].flatten(0, 1)
            self.running.ended = self.plan.ends(ids, logprobs.flatten(0, 1)).view_as(self.running.ended)
        if place + 1 == self.running.ids.shape[-1] or (self.plan.criteria and bool(self.running.ended.all())):
            self._offer_rest(length)
            return usable, torch.zeros_like(self.open.any())
        return usable, self.open.any()

    def _by_eos(self, tokens: Tensor) -> Tensor:
        if self.plan.eos is None:
            return torch.zeros_like(tokens)
        return torch.isin(tokens, self.plan.eos).long()

    def _offer_complete(self, candidates: Hypotheses, length: int, place: int) -> None:
        """What ended among the first n candidates, if it holds all phrases."""
        parents = (candidates.parents[:, :, place - self.prompt_length] - self.rows)[:, : self.size]
        complete = torch.tensor([[p.complete for p in row] for row in self.progress], device=parents.device)
        eligible = torch.zeros_like(candidates.ended, dtype=torch.bool)
        eligible[:, : self.size] = (candidates.ended[:, : self.size] > 0) & complete.gather(1, parents)
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
        self.running.ended = _at_last(self.running.ended)
        self.offer(self.running, complete, length)
        enough = (self.finished.ended > 0).sum(-1, keepdim=True) >= self.plan.config.num_return_sequences
        lacking = ~complete & ~enough & self.open
        scores = torch.where(lacking, self.running.scores / length**self.plan.config.length_penalty, float("-inf"))
        rest = Hypotheses(self.running.ids, scores, self.running.parents, self.running.ended * lacking)
        late = torch.cat((torch.zeros_like(self.finished.scores), lacking.float() * UNLIKELY / 2), dim=1)
        both = self.finished + rest
        # In float64 a score keeps its digits beside the handicap.
        self.finished = both.take((both.scores.double() + late).topk(self.size).indices)


class Search:
    """The rows of all beams, a prompt's groups side by side; the steps over them, and what the host is told."""

    def __init__(self, model: CausalLM, prompt: Prompt, plan: Plan):
        outputs = plan.outputs
        wanted = {n: getattr(outputs, n) is not None for n in ("attentions", "hidden_states")}
        self.rows = Rows(model, prompt, plan.total, plan.pad, **wanted)
        self.prompts = prompt.ids
        self.plan = plan
        self.groups = _groups(model, prompt.ids, plan)
        self.queue = HostQueue(self.rows.device)
        self.going = torch.ones((), dtype=torch.bool, device=self.rows.device)
        self.delivered = 0

    def step(self, out: Any) -> None:
        """Give every beam its next token, group after group. out: of the pass over the newest tokens of all rows."""
        plan, rows, place = self.plan, self.rows, self.rows.length
        logits = out.logits[:, -1].float()
        plain = logits.log_softmax(-1)
        # (B, V): how often the groups before chose a token at this step
        used = torch.zeros_like(self._by_prompt(plain)[:, 0]) if len(self.groups) > 1 else None
        seen, usable, going = [], [], []
        for group in self.groups:
            apart = plain if used is None else self._apart(plain, used)
            logprobs = self._by_prompt(plan.process(rows.ids, apart))[:, group.place]
            seen.append(logprobs)
            group.open = was_open = group.open & self.going  # a step behind the end changes nothing
            could, goes = group.advance(logprobs, place)
            usable.append(could)
            going.append(goes)
            if used is not None:
                tokens = torch.where(was_open, group.running.ids[:, :, place], plan.pad)  # a closed one chooses nothing
                used = used.scatter_add(1, tokens, torch.ones_like(tokens, dtype=used.dtype))
        plan.outputs.add(out, logits, _joined(seen).flatten(0, 1))
        self._move(reduce(add, (group.running for group in self.groups)), reduce(and_, usable), reduce(or_, going))

    def _by_prompt(self, values: Tensor) -> Tensor:
        """(R, V) -> (B, beams of a prompt, V)."""
        return values.view(len(self.prompts), self.plan.copies, -1)

    def _apart(self, logprobs: Tensor, used: Tensor) -> Tensor:
        """(R, V): less for what other groups have chosen."""
        return (self._by_prompt(logprobs) - self.plan.config.diversity_penalty * used[:, None]).flatten(0, 1)

    def _move(self, running: Hypotheses, usable: Tensor, going: Tensor) -> None:
        """Rows, cache and host follow the beams that run on. usable: bool (B,); going: one bool."""
        rows = self.rows
        step = rows.length - self.prompts.shape[1]
        rows.buffer = running.ids.flatten(0, 1)
        if rows.cache is not None:
            rows.cache.reorder_cache(running.parents[:, :, step].flatten())
        rows.length += 1
        self.going = self.going & going
        self.queue.send(torch.where(usable, 0, NO_TOKEN), (~self.going).long()[None])

    def over(self) -> bool:
        last = self.rows.length == self.plan.total
        for *problems, done in self.queue.read(flush=last):
            self.delivered += 1
            refuse_no_token(problems, self.delivered)
            if done:
                return True
        return last

    def best(self) -> Hypotheses:
        """The first num_return_sequences of each prompt."""
        finished = reduce(add, (group.finished for group in self.groups))
        if len(self.groups) > 1:
            finished = finished.best(self.plan.copies)
        count = torch.arange(self.plan.config.num_return_sequences, device=finished.ids.device)
        return finished.take(count.expand(len(finished.ids), -1))

    def tokens(self, best: Hypotheses) -> StepTokens:
        """All new tokens of each result at once: a search changes them until the end."""
        rows = best.ids[:, :, self.prompts.shape[1] :].flatten(0, 1).tolist()
        lengths = (best.parents >= 0).sum(-1).flatten().tolist()
        # What never ended stands in where every token was forbidden before there were enough results.
        reasons = [REASONS[ended] or "stop" for ended in best.ended.flatten().tolist()]
        return StepTokens([row[:length] for row, length in zip(rows, lengths, strict=True)], reasons)

    def output(self, best: Hypotheses) -> GenerateBeamDecoderOnlyOutput:
        """Its results, (B * num_return_sequences, P + longest) with padding after shorter ones."""
        parents = best.parents.flatten(0, 1)
        longest = int((parents >= 0).sum(-1).max())
        if self.rows.cache is not None and self.rows.length - self.prompts.shape[1] > self.delivered:
            self.rows.cache.crop(-1)  # a step that was on its way when the search ended
        return GenerateBeamDecoderOnlyOutput(
            sequences=best.ids.flatten(0, 1)[:, : self.prompts.shape[1] + longest],
            sequences_scores=None if self.plan.outputs.scores is None else best.scores.flatten(),
            beam_indices=parents[:, :longest],
            past_key_values=self.rows.cache,
            **self.plan.outputs.kept(self.delivered),
        )


def _groups(model: CausalLM, prompt: Tensor, plan: Plan) -> list[Beams]:
    constraints = _constraints(plan, model.config.vocab_size)
    if constraints:
        return [ConstrainedBeams(prompt, plan, plan.copies, constraints)]
    size = plan.copies // plan.config.num_beam_groups
    return [Beams(prompt, plan, size, first) for first in range(0, plan.copies, size)]


def _constraints(plan: Plan, vocabulary: int) -> list[Constraint]:
    config = plan.config
    constraints = list(config.constraints or ()) + from_words(config.force_words_ids or ())
    for token in (t for c in constraints for phrase in c.phrases for t in phrase):
        if token >= vocabulary:
            raise TokenOutOfRange(
                f"a constraint holds the token id {token}, which is outside the vocabulary of {vocabulary} ids."
            )
    return constraints


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def beam_search(model: CausalLM, prompt: Prompt, plan: Plan) -> Steps[GenerateBeamDecoderOnlyOutput]:
    """Keep the num_beams best continuations of each prompt, or with do_sample draw them by probability."""
    search = Search(model, prompt, plan)
    search.step(search.rows.prefill(plan.copies, plan.config.prefill_chunk_size))
    while not search.over():
        search.step(search.rows.next())
    best = search.best()
    out = search.output(best)
    yield search.tokens(best)
    return out
