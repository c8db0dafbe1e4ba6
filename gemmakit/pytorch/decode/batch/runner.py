"""One step of a batch on the device: prompt parts and decoding rows through the model, next tokens chosen.

Axis letters: S tokens of a pass, R rows that choose, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from gemmakit.pytorch.cache.paged import PagedCache, Span, sent
from gemmakit.pytorch.decode.batch.capture import BatchCapture
from gemmakit.pytorch.decode.batch.choose import choose_tokens, likeliest, logprobs_of
from gemmakit.pytorch.decode.batch.events import PromptLogprob
from gemmakit.pytorch.decode.batch.requests import Row
from gemmakit.pytorch.decode.batch.scheduler import Part
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.step import forward
from gemmakit.pytorch.decode.stream import HostCopy
from gemmakit.pytorch.kernels import batch_invariant
from gemmakit.pytorch.row_adapters import RowAdapters

# Prompt positions whose logits are held at a time: of 262,144 tokens 64 MiB.
SCORED = 64


@dataclass
class Outcome:
    """What a pass gave a part: its token and the scores (1, V) behind it, or an error; nothing for an inner part.

    logprobs: (1, V) of the model, where they are asked for. prompt_logprobs: of the prompt's tokens that are new.
    """

    part: Part
    token: int | None = None
    scores: Tensor | None = None
    error: Exception | None = None
    logprobs: Tensor | None = None
    prompt_logprobs: Sequence[PromptLogprob] = ()


@dataclass
class _Choice:
    """The next tokens of some parts, on the device and on their way to the host."""

    parts: Sequence[Part]
    tokens: Tensor
    copy: HostCopy
    scores: Tensor | None
    errors: dict[int, Exception] = field(default_factory=dict["int", "Exception"])
    logprobs: dict[int, Tensor] = field(default_factory=dict["int", "Tensor"])


@dataclass
class Started:
    """A step that was started: everything that ran, and what was chosen."""

    parts: tuple[Part, ...]
    choices: list[_Choice]
    prompt_logprobs: dict[int, list[PromptLogprob]]

    @property
    def tokens(self) -> Tensor:
        return self.choices[0].tokens if len(self.choices) == 1 else torch.cat([c.tokens for c in self.choices])

    @property
    def order(self) -> dict[int, int]:
        """Where in `tokens` a sequence's is."""
        return {part.sequence.id: i for i, part in enumerate(part for c in self.choices for part in c.parts)}

    def read(self) -> deque[Outcome]:
        """Waits for the tokens. Of a part with a draft, all that follow what was picked, a token an outcome."""
        found = {part.sequence.id: [Outcome(part)] for part in self.parts}
        drafts = {part.sequence.id: part.draft for part in self.parts}
        for choice in self.choices:
            for i, (part, token) in enumerate(zip(choice.parts, choice.copy.read(), strict=True)):
                told, draft = found[part.sequence.id], drafts[part.sequence.id]
                scores = None if choice.scores is None else choice.scores[i : i + 1]
                outcome = Outcome(part, token, scores, choice.errors.get(i), choice.logprobs.get(i))
                if told[-1].token is None:
                    told[:] = [outcome]
                elif told[-1].token == draft[len(told) - 1]:
                    told.append(outcome)
        for id, logprobs in self.prompt_logprobs.items():
            found[id][0].prompt_logprobs = logprobs
        return deque(outcome for told in found.values() for outcome in told)


class Runner:
    """Runs what the scheduler plans. Nothing but pages is taken until the step is settled.

    On the CPU all parts go through one packed pass, which reads each weight once. On an accelerator rows of one token
    have a pass of their own, for which there are recorded steps and a kernel that reads pages.
    """

    def __init__(self, model: CausalLM, cache: PagedCache, rows: Mapping[int, Row], captured: BatchCapture | None):
        self.model, self.cache, self.rows, self.captured = model, cache, rows, captured
        self.adapters: RowAdapters | None = None  # those of which requests choose
        self._on_cpu = model.device.type == "cpu"
        self.invariant = False

    def start(self, prefill: Sequence[Part], decode: Sequence[Part], before: Started | None = None) -> Started:
        """As _start; where `invariant`, so that a token's results are its own, whatever else is in the pass."""
        with batch_invariant() if self.invariant else nullcontext():
            return self._start(prefill, decode, before)

    def _start(self, prefill: Sequence[Part], decode: Sequence[Part], before: Started | None = None) -> Started:
        """before: the step whose tokens the decoding rows go on with, which the host does not know yet."""
        choices: list[_Choice] = []
        ran: list[tuple[Sequence[Part], Tensor]] = []
        scored: dict[int, list[PromptLogprob]] = {}
        rest = decode
        if decode and not (prefill and self._on_cpu):
            static = self._replayed(decode, before)
            rest = decode if static is None else ()
            if isinstance(static, _Choice):
                choices.append(static)
            elif static is not None:
                ran.append((decode, static))
        packed = (*prefill, *rest) if self._on_cpu else prefill
        if packed:
            with self._adapted(packed):
                ran.append(self._packed(packed, before, scored))
        if rest and not self._on_cpu:
            with self._adapted(rest):
                ran.append((rest, self._side_by_side(rest, before)))
        ran = [(parts, logits) for parts, logits in ran if parts]
        if ran:
            choices.append(self._choose(ran))
        return Started((*prefill, *decode), choices, scored)

    # -- passes ----------------------------------------------------------------------------------------------------

    def _packed(
        self, parts: Sequence[Part], before: Started | None, scored: dict[int, list[PromptLogprob]]
    ) -> tuple[Sequence[Part], Tensor]:
        """Parts of any length as one row: those that choose, a token each, and the logits (R, V) they choose from.

        scored: takes what is asked of the prompts' own tokens.
        """
        where, model = self.cache.place(_spans(parts), packed=True), self.model
        ids = self._ids(parts, before)[None]
        begins = list(accumulate((part.end - part.start for part in parts), initial=0))
        chosen = [one for part in parts for one in part.deciding]
        ends = [end + one.end - part.end for part, end in zip(parts, begins[1:], strict=True) for one in part.deciding]
        last = sent([end - 1 for end in ends], model.device)
        asked = [(part, at) for part, at in zip(parts, begins, strict=False) if self._row(part).unscored(part)]
        if chosen and not asked:
            return chosen, forward(model, ids, self.cache, None, where.positions, keep=last).logits[0]
        hidden = model.model(ids, position_ids=where.positions, past_key_values=self.cache, return_dict=True)[0][0]
        for part, at in asked:
            scored[part.sequence.id] = self._scores(part, hidden[at : at + part.end - part.start])
        return chosen, model.compute_logits(hidden[last]) if chosen else hidden

    def _scores(self, part: Part, hidden: Tensor) -> list[PromptLogprob]:
        """How the model expected the prompt's tokens that follow those of a part. hidden: (S, D), of the part."""
        row, found = self._row(part), []
        wanted, count = row.unscored(part), row.request.prompt_logprobs or 0
        for first in range(0, len(wanted), SCORED):
            places = wanted[first : first + SCORED]
            logits = self.model.compute_logits(hidden[places.start - part.start : places.stop - part.start])
            for place, line in zip(places, logits, strict=True):
                token = part.sequence.tokens[place + 1]
                found.append(PromptLogprob(token, *likeliest(logprobs_of(line), token, count)))
        return found

    def _side_by_side(self, parts: Sequence[Part], before: Started | None) -> Tensor:
        """Parts of one token, each a row of the pass. Logits (R, V)."""
        where = self.cache.place(_spans(parts))
        ids, mask = self._ids(parts, before)[:, None], self.cache.masks()
        return forward(self.model, ids, self.cache, mask, where.positions).logits[:, -1]

    def _replayed(self, parts: Sequence[Part], before: Started | None) -> _Choice | Tensor | None:
        """What the recorded pass gives: tokens, or logits where rows choose apart; None where there is no such pass."""
        if self.captured is None or not all(part.last and not part.draft for part in parts):
            return None
        rows = [self._row(part) for part in parts]
        if any(row.unscored(part) for row, part in zip(rows, parts, strict=True)):
            return None
        ids, tokens = _inputs(parts, before)
        static = self.captured.loaded(rows, _spans(parts), ids, tokens)
        if static is None:
            return None
        static.run(rows)
        if static.chosen_by is None:
            assert static.logits is not None
            return static.logits[: len(rows)]
        tokens = static.tokens[: len(rows)]
        return _Choice(parts, tokens, HostCopy(tokens), None)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _adapted(self, parts: Sequence[Part]) -> AbstractContextManager[None]:
        """Within, the tokens of each part take the adapter of its request."""
        if self.adapters is None:
            return nullcontext()
        chosen = [(self._row(part).request.adapter, part.end - part.start) for part in parts]
        return self.adapters.chosen(chosen, self.model.device)

    def _row(self, part: Part) -> Row:
        return self.rows[part.sequence.id]

    def _ids(self, parts: Sequence[Part], before: Started | None) -> Tensor:
        """(S,): the tokens of the parts, end to end."""
        ids, tokens = _inputs(parts, before)
        if tokens is None:
            return sent(ids, self.model.device)
        return tokens[sent(ids, tokens.device)].clamp_min(0)

    def _choose(self, ran: Sequence[tuple[Sequence[Part], Tensor]]) -> _Choice:
        """The next tokens of the parts that passes ended with, each with its logits."""
        parts = [part for group, _ in ran for part in group]
        rows = [self._row(part) for part in parts]
        logits = torch.cat([logits for _, logits in ran]) if len(ran) > 1 else ran[0][1]
        # Before processors are called, which may write to what they are given.
        logprobs = {i: logprobs_of(logits[i]) for i, row in enumerate(rows) if row.logprobs is not None}
        tokens, scores, errors = choose_tokens(rows, [part.end for part in parts], logits)
        return _Choice(parts, tokens, HostCopy(tokens), scores, errors, logprobs)


def _inputs(parts: Sequence[Part], before: Started | None) -> tuple[list[int], Tensor | None]:
    """The tokens of the parts; or the places of their one token among those that are still on the device, and these."""
    if before is None:
        return [token for part in parts for token in part.tokens], None
    order = before.order
    return [order[part.sequence.id] for part in parts], before.tokens


def _spans(parts: Sequence[Part]) -> list[Span]:
    return [Span(part.sequence.holding.pages, part.start, part.end) for part in parts]
