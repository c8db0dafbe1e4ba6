"""Tokens that a row of a batch proposes to itself: what followed its last ones before, checked in the pass that runs.

Nothing but the width of passes changes: where a token's bits do not depend on what else is in a pass, a row that checks
proposals is to the bit the row that does not. Whether it pays is booked at fixed prices and without a clock, so that
the same requests take the same steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from gemmakit.pytorch.cache.pages import PagePool
from gemmakit.pytorch.decode.batch.requests import Row
from gemmakit.pytorch.decode.batch.scheduler import Part, Step
from gemmakit.pytorch.decode.drafts import WIDTH_COST, Gain, Repeats
from gemmakit.pytorch.decode.processors import repeatable
from gemmakit.pytorch.kernels import Decision
from gemmakit.pytorch.kernels.cpu import MAX_ROWS


def speculation(invariance: Decision, overlap: bool, asked: bool | None = None) -> Decision:
    """Whether rows propose tokens to themselves. asked: False, not to; overlap: steps begin before tokens are read."""
    why = "speculate is False" if asked is False else "its steps overlap" if overlap else invariance.why
    return Decision("a token a step", why) if why else Decision("several tokens a step where text repeats")


class Drafts:
    """What one row proposes, and how that went."""

    def __init__(self) -> None:
        self.repeats, self.gain = Repeats(), Gain(WIDTH_COST["cpu"])

    def propose(self, row: Row, price: float) -> tuple[int, ...]:
        """Tokens after the row's last one, up to an eos; none where they do not pay.

        price: of a proposed token, in tokens of this row.
        """
        tokens, repeats = row.sequence.tokens, self.repeats
        if repeats.tokens:
            self.gain.follow(repeats, tokens[len(repeats.tokens) :])
        else:
            repeats.extend(tokens)
        self.gain.cost = price
        most = min(MAX_ROWS - 1, row.sequence.limit - len(tokens) - 1)  # a pass decides one token more
        found = repeats.continuation(self.gain.count(repeats.run, most))
        end = next((i + 1 for i, token in enumerate(found) if token in row.step.eos_ids), len(found))
        return tuple(found[:end])


class Speculation:
    """Proposes for all rows of an engine. rows: by the number of their sequence; proposed, accepted: tokens so far."""

    def __init__(self, rows: Mapping[int, Row], pool: PagePool):
        self.rows, self.pool = rows, pool
        self.proposed = self.accepted = 0

    def drafted(self, step: Step) -> Step:
        """The step with what its decoding rows propose.

        Processors of the caller's own are asked of no token that may not come. No row gets pages that another may ask
        for in the next step.
        """
        tokens = sum(part.end - part.start for part in (*step.prefill, *step.decode))
        reserved = len(step.prefill) + len(step.decode)
        return replace(step, decode=tuple(self._drafted(part, price_of(tokens), reserved) for part in step.decode))

    def learn(self, parts: Iterable[Part], decided: Iterable[Part]) -> None:
        """Book what parts of a step have decided, a token each."""
        counts = Counter(part.sequence.id for part in decided)
        for part in parts:
            row, accepted = self.rows.get(part.sequence.id), counts[part.sequence.id] - 1
            if row is not None and accepted >= 0:
                row.keep(accepted + 1)
            if row is not None and row.drafts is not None and accepted >= 0:
                row.drafts.gain.enter(len(part.draft), accepted)
                self.proposed += len(part.draft)
                self.accepted += accepted

    def _drafted(self, part: Part, price: float, reserved: int) -> Part:
        row, holding = self.rows[part.sequence.id], part.sequence.holding
        if not part.last or row.new_tokens < 1 or not all(map(repeatable, row.step.processors)):
            return part
        row.drafts = row.drafts or Drafts()
        draft = row.drafts.propose(row, price)
        wanted = self.pool.needed(part.end + len(draft))
        if not draft or wanted - len(holding.pages) + reserved > self.pool.idle:
            return part
        self.pool.grow(holding, wanted)
        row.propose(draft)
        return replace(part, end=part.end + len(draft), draft=draft)


def price_of(tokens: int) -> float:
    """What one more token in a pass over so many costs, in tokens: its share of the pass over their share of it."""
    cost = WIDTH_COST["cpu"]
    return cost * tokens / (1 + cost * (tokens - 1))
