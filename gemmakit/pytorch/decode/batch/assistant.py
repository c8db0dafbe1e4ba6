"""A smaller model that proposes tokens to many rows of a batch at once: as many passes as tokens, all rows in each.

Its keys lie in a cache of its own, at the places that the rows' pages have in the model's. So nobody books pages twice:
who holds a page, shares a prefix or is sent back does so in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from gemmakit.errors import InputError
from gemmakit.pytorch.cache.paged import PagedCache
from gemmakit.pytorch.cache.pages import PagePool
from gemmakit.pytorch.decode.batch.requests import Row
from gemmakit.pytorch.decode.batch.runner import Outcome, Runner
from gemmakit.pytorch.decode.batch.scheduler import Part
from gemmakit.pytorch.decode.batch.scheduler import Sequence as Text
from gemmakit.pytorch.decode.drafts import AS_LIKELY, WIDTH_COST, ModelGain, bytes_share, check_assistant
from gemmakit.pytorch.decode.invariance import invariance
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.kernels import Decision


class Assistant:
    """Reads what rows have, `prefill_tokens` a step, and proposes what it would say next, as a row would choose it.

    Nothing depends on what it says: the model chooses each token itself. Adapters are the model's alone. What rows have
    read is a `Text` over their own pages, whose tokens behind `prompt_length` are proposals.

    proposed, accepted: tokens so far. overall: how that went of late, whoever asked.
    """

    def __init__(self, model: CausalLM, helped: CausalLM, rows: Mapping[int, Row], pool: PagePool, prefill_tokens: int):
        devices = [layer.input_layernorm.weight.device for layer in model.model.layers]
        self.cache = PagedCache(model.config, pool.pages, pool.page_size, model.dtype, devices)
        self.rows, self.pool, self.prefill_tokens = rows, pool, prefill_tokens
        self.share, self.settings = bytes_share(model, helped), model.generation_config
        self.positions = model.config.max_position_embeddings
        self.proposed = self.accepted = 0
        self.overall = ModelGain(WIDTH_COST["cpu"] + self.share, self.settings)
        self._runner = Runner(model, self.cache, rows, None)
        self._runner.invariant = not invariance(model).why
        # Full pages that hold its keys too, and how often they had been handed out then.
        self._read: dict[int, int] = {}

    def gain(self) -> ModelGain:
        """For one row: what others found out need not be paid for again."""
        return ModelGain(self.overall.usual, self.settings, self.overall.chance(AS_LIKELY))

    def learn(self, proposed: int, accepted: int) -> None:
        self.proposed += proposed
        self.accepted += accepted
        self.overall.enter(proposed, accepted)

    def propose(self, counts: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
        """At most so many tokens for each sequence, by its number; none where its text is still to be read.

        The rows have the pages of these tokens. They are drawn by the noise that they will meet, and the draws are
        taken back.
        """
        rows = [self.rows[id] for id in counts]
        states = [(row.generator, row.generator.get_state()) for row in rows if row.generator is not None]
        try:
            parts = self._unread(rows)
            while parts:
                # Packed, so that no key is read but those that were written: pages need no clearing.
                outcomes = self._runner.start(parts, ()).read()
                parts = [part for outcome in outcomes if (part := self._follow(outcome, counts)) is not None]
        finally:
            for generator, state in states:
                generator.set_state(state)
        return {row.sequence.id: tuple(_proposed(row.read)) for row in rows if row.read is not None}

    def _unread(self, rows: Sequence[Row]) -> list[Part]:
        """What each row has that was not read, or as much as a step reads, those first that lack least. What two rows
        share, one of them reads while the other waits.
        """
        parts: list[Part] = []
        budget, taken = self.prefill_tokens, set[int]()
        for row in rows:
            row.read = self._text(row)
        for text in sorted((row.read for row in rows if row.read is not None), key=lambda text: text.pending):
            pages, size = text.holding.pages, self.pool.page_size
            count = min(text.pending, max(budget, 1))
            if pages[text.computed // size] in taken:
                continue
            budget -= count - 1
            end = text.computed + count
            taken.update(pages[text.computed // size : end // size])
            parts.append(Part(text, text.computed, end, last=count == text.pending))
        return parts

    def _text(self, row: Row) -> Text:
        """The row's tokens, of which those are computed that were read as they now are."""
        own, before = row.sequence, row.read
        full = takewhile(lambda page: self._read.get(page) == self.pool.taken[page], own.holding.pages)
        read = sum(1 for _ in full) * self.pool.page_size
        if before is not None and before.holding is own.holding:
            said = zip(before.tokens[before.prompt_length :], own.tokens[before.prompt_length :], strict=False)
            came = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], said))
            read = max(read, min(before.computed, before.prompt_length + came))
        return Text(own.id, list(own.tokens), own.limit, min(read, len(own.tokens) - 1), holding=own.holding)

    def _follow(self, outcome: Outcome, counts: Mapping[int, int]) -> Part | None:
        """Write down what a pass gave a row; what to run next to get one token more, None if that is not wanted."""
        part, text = outcome.part, outcome.part.sequence
        row, pages, size = self.rows[text.id], text.holding.pages, self.pool.page_size
        text.computed = part.end
        for page in pages[part.start // size : min(part.end, text.prompt_length) // size]:
            self._read[page] = self.pool.taken[page]
        if outcome.token is None:
            return None
        # A model that is not sound proposes what it will, and learns that it was wrong.
        text.tokens.append(max(outcome.token, 0))
        row.propose(_proposed(text))
        ends = outcome.error is not None or outcome.token < 0 or outcome.token in row.step.eos_ids
        if ends or len(_proposed(text)) >= counts[text.id] or self._unsure(outcome):
            return None
        return Part(text, part.end, len(text.tokens), last=True)

    def _unsure(self, outcome: Outcome) -> bool:
        """Whether a proposed token is so unlikely that none is proposed after it."""
        threshold = self.settings.assistant_confidence_threshold
        if not threshold or outcome.scores is None:
            return False
        return not float(outcome.scores.softmax(-1)[0, outcome.token]) >= threshold


def check_assisted(assistant: CausalLM, model: CausalLM, speculate: Decision) -> None:
    """Raises InputError for one that cannot propose to rows of this model, or where rows check no proposals."""
    check_assistant(assistant, model)
    if speculate.why:
        raise InputError(f"assistant_model is given, but {speculate.why}: leave it out.")
    if assistant.device != model.device:
        raise InputError(
            f"assistant_model is on {assistant.device} and the model on {model.device}: load both on one device."
        )


def _proposed(text: Text) -> list[int]:
    return text.tokens[text.prompt_length :]
