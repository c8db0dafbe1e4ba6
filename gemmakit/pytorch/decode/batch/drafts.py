"""Tokens that rows of a batch propose, checked in the pass that runs: by their own text, what followed their last ones
before; or by a smaller model, which all of them ask at once.

Nothing but the width of passes changes: where a token's bits do not depend on what else is in a pass, a row that checks
proposals is to the bit the row that does not. Whether it pays is booked at fixed prices and without a clock, so that
the same requests take the same steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gemmakit.pytorch.cache.pages import PagePool
from gemmakit.pytorch.decode.batch.assistant import Assistant
from gemmakit.pytorch.decode.batch.requests import Row
from gemmakit.pytorch.decode.batch.scheduler import Part, Step
from gemmakit.pytorch.decode.drafts import AS_LIKELY, WIDTH_COST, Gain, ModelGain, Repeats
from gemmakit.pytorch.decode.processors import repeatable
from gemmakit.pytorch.kernels import Decision
from gemmakit.pytorch.kernels.cpu import MAX_ROWS


def speculation(invariance: Decision, overlap: bool, asked: bool | None = None) -> Decision:
    """Whether rows propose tokens. asked: False, not to; overlap: steps begin before tokens are read."""
    why = "speculate is False" if asked is False else "its steps overlap" if overlap else invariance.why
    return Decision("a token a step", why) if why else Decision("several tokens a step where they are foreseen")


class Drafts:
    """What one row proposes, and how that went.

    gain: of its own text. model: of the model that the engine asks, if there is one. by: whose proposal is checked.
    """

    def __init__(self, model: ModelGain | None = None) -> None:
        self.repeats, self.gain = Repeats(), Gain(WIDTH_COST["cpu"])
        self.model = model
        self.by: Gain = self.gain

    def propose(self, row: Row, price: float) -> tuple[int, ...]:
        """Tokens after the row's last one, up to an eos, by its own text; none where they do not pay.

        price: of a proposed token, in tokens of this row.
        """
        tokens, repeats = row.sequence.tokens, self.repeats
        if repeats.tokens:
            self.gain.follow(repeats, tokens[len(repeats.tokens) :])
        else:
            repeats.extend(tokens)
        self.gain.cost = price
        found = repeats.continuation(self.gain.count(repeats.run, _most(row)))
        end = next((i + 1 for i, token in enumerate(found) if token in row.step.eos_ids), len(found))
        return tuple(found[:end])

    def wanted(self, row: Row, price: float, positions: int) -> int:
        """How many tokens to ask the model for, which has so many positions. price: of one, its passes included."""
        assert self.model is not None
        self.model.cost = price
        return self.model.wanted(max(0, min(_most(row), positions - len(row.sequence.tokens))))

    def asks(self, text: Sequence[int]) -> bool:
        """Whether the model is more likely right than what the row's own text proposes, which is free."""
        if self.model is None:
            return False
        return not text or self.gain.chance(self.repeats.run) < self.model.chance(AS_LIKELY)

    def learn(self, proposed: int, accepted: int) -> None:
        for gain in (self.gain, self.model):
            if gain is not None:
                gain.enter(*((proposed, accepted) if gain is self.by else (0, 0)))


class Speculation:
    """Proposes for all rows of an engine. rows: by the number of their sequence; proposed, accepted: tokens so far."""

    def __init__(self, rows: Mapping[int, Row], pool: PagePool, assistant: Assistant | None = None):
        self.rows, self.pool, self.assistant = rows, pool, assistant
        self.proposed = self.accepted = 0

    def drafted(self, step: Step) -> Step:
        """The step with what its decoding rows propose.

        Processors of the caller's own are asked of no token that may not come. No row gets pages that another may ask
        for in the next step.
        """
        tokens = sum(part.end - part.start for part in (*step.prefill, *step.decode))
        reserved = len(step.prefill) + len(step.decode)
        rows = [self.rows[part.sequence.id] for part in step.decode if self._may_propose(part)]
        texts = {row.sequence.id: self._drafts(row).propose(row, price_of(tokens)) for row in rows}
        asked = self._asking([row for row in rows if self._drafts(row).asks(texts[row.sequence.id])], tokens)
        most = {id: max(len(text), asked.get(id, 0)) for id, text in texts.items()}
        room = {part.sequence.id for part in step.decode if self._grow(part, most.get(part.sequence.id, 0), reserved)}
        asked = {id: count for id, count in asked.items() if id in room}
        said = self.assistant.propose(asked) if self.assistant is not None and asked else {}
        return replace(
            step,
            decode=tuple(
                self._with(part, texts[part.sequence.id], said.get(part.sequence.id, ()))
                if part.sequence.id in room
                else part
                for part in step.decode
            ),
        )

    def learn(self, parts: Iterable[Part], decided: Iterable[Part]) -> None:
        """Book what parts of a step have decided, a token each."""
        counts = Counter(part.sequence.id for part in decided)
        for part in parts:
            row, accepted = self.rows.get(part.sequence.id), counts[part.sequence.id] - 1
            if row is not None and accepted >= 0:
                row.keep(accepted + 1)
            if row is not None and row.drafts is not None and accepted >= 0:
                row.drafts.learn(len(part.draft), accepted)
                self.proposed += len(part.draft)
                self.accepted += accepted
                if self.assistant is not None and row.drafts.by is row.drafts.model:
                    self.assistant.learn(len(part.draft), accepted)

    def _may_propose(self, part: Part) -> bool:
        row = self.rows[part.sequence.id]
        return part.last and row.new_tokens >= 1 and all(map(repeatable, row.step.processors))

    def _drafts(self, row: Row) -> Drafts:
        if row.drafts is None:
            row.drafts = Drafts(None if self.assistant is None else self.assistant.gain())
        return row.drafts

    def _asking(self, rows: Sequence[Row], tokens: int) -> dict[int, int]:
        """Of rows that may ask the model, those for which that pays, each for how many tokens: they share its passes.

        tokens: of the pass of the model that is helped, without proposals.
        """
        while rows and (helper := self.assistant) is not None:
            price = price_of(tokens) + helper.share * per_token(len(rows)) / per_token(tokens)
            wanted = [self._drafts(row).wanted(row, price, helper.positions) for row in rows]
            asking = [row for row, count in zip(rows, wanted, strict=True) if count]
            if len(asking) == len(rows):
                return {row.sequence.id: count for row, count in zip(rows, wanted, strict=True)}
            rows = asking
        return {}

    def _grow(self, part: Part, count: int, reserved: int) -> bool:
        """Pages for so many proposals of a row; False where there are none, or no pages."""
        holding, wanted = part.sequence.holding, self.pool.needed(part.end + count)
        if not count or wanted - len(holding.pages) + reserved > self.pool.idle:
            return False
        return self.pool.grow(holding, wanted)

    def _with(self, part: Part, text: tuple[int, ...], said: tuple[int, ...]) -> Part:
        """The part with what the model said or, where it was not asked or has yet to read, what its text proposes."""
        row = self.rows[part.sequence.id]
        drafts, draft = self._drafts(row), said or text
        drafts.by = drafts.model if said and drafts.model is not None else drafts.gain
        row.propose(draft)
        return replace(part, end=part.end + len(draft), draft=draft)


def _most(row: Row) -> int:
    """Tokens that a row may propose: a pass decides one more."""
    return min(MAX_ROWS - 1, row.sequence.limit - len(row.sequence.tokens) - 1)


def per_token(tokens: int) -> float:
    """What each token of a pass over so many takes, in passes over one."""
    return (1 + WIDTH_COST["cpu"] * (tokens - 1)) / tokens


def price_of(tokens: int) -> float:
    """What one more token in a pass over so many costs, in tokens: its share of the pass over their share of it."""
    return WIDTH_COST["cpu"] / per_token(tokens)
