"""The decoding pass of a batch engine on fixed memory, so that an accelerator can replay it.

One token each of `rows` rows over the pages of a cache: inputs in, model, processors and sampler, tokens out. Numbers
of rows and pages are rounded up so that few graphs serve all steps. Axis letters: R rows, P pages a row, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from gemmakit.pytorch.cache.paged import PagedCache, Placement, Span, sent
from gemmakit.pytorch.cache.pages import NULL_PAGE
from gemmakit.pytorch.decode import capture
from gemmakit.pytorch.decode.batch.choose import shared_chain
from gemmakit.pytorch.decode.batch.requests import Row
from gemmakit.pytorch.decode.processors import Processor
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import greedy, sampler
from gemmakit.pytorch.decode.step import Step, forward
from gemmakit.pytorch.row_adapters import row_adapters

MAX_ROWS = 256
MIN_PAGES = 4
# A batch passes through many sizes; one that comes this often is worth recording, which runs it four times over.
WORTH_USES = 4


class StaticBatch:
    """One pass over rows of one token each.

    Rows that are too many repeat the first one: they write what it writes, to the same place. chain: the processors of
    all rows, None to leave the choice to the caller; sampled: whether tokens are drawn.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: PagedCache,
        rows: int,
        pages: int,
        chain: Sequence[Processor] | None,
        sampled: bool,
    ):
        self.model, self.cache, self.rows, self.pages = model, cache, rows, pages
        device = model.device
        self.inputs = torch.zeros(rows * (3 + pages), dtype=torch.long, device=device)
        ids, places, lengths, table = self.inputs.split([rows, rows, rows, rows * pages])
        self.ids = ids[:, None]
        self.where = Placement(places, table.view(rows, pages), lengths, past=0, keys=pages * cache.page_size)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.noise = torch.ones((rows, model.config.vocab_size), device=device) if sampled else None
        pick = greedy if self.noise is None else sampler(lambda like: cast(Tensor, self.noise))
        self.chosen_by = None if chain is None else Step(chain, pick)
        self.logits: Tensor | None = None  # (R, V) of the last step, where the caller chooses
        self._replay: capture.Runnable | None = None

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes + self.tokens.nbytes + (0 if self.noise is None else self.noise.nbytes)

    def record(self, taken: capture.StepCapture) -> None:
        """After `load`: recording writes what the step itself writes."""
        self._replay = taken.capture(self.step)

    def step(self) -> None:
        self.cache.placement = where = replace(self.where)  # what is derived of it is part of the step
        out = forward(self.model, self.ids, self.cache, self.cache.masks(), where.positions)
        if self.chosen_by is None:
            self.logits = out.logits[:, -1]
        else:
            self.tokens.copy_(self.chosen_by.choose(self.ids, out.logits[:, -1])[0])

    def load(self, spans: Sequence[Span], ids: Sequence[int], before: Tensor | None) -> None:
        """The rows of the next step. ids: their tokens or, with `before`, the places of these in it, on the device."""
        size, extra = self.cache.page_size, self.rows - len(spans)
        flat = [*ids, *[ids[0]] * extra]
        places = [s.pages[s.start // size] * size + s.start % size for s in spans]
        flat += [*places, *[places[0]] * extra]
        flat += [*(s.end for s in spans), *[spans[0].end] * extra]
        for s in (*spans, *[spans[0]] * extra):
            held = s.pages[: -(-s.end // size)]
            flat += [*held, *[NULL_PAGE] * (self.pages - len(held))]
        self.inputs.copy_(sent(flat, self.inputs.device))
        if before is not None:
            self.ids.copy_(before[self.ids].clamp_min(0))

    def run(self, rows: Sequence[Row]) -> None:
        if self.noise is not None:
            for line, row in zip(self.noise, rows, strict=False):
                line.exponential_(generator=row.generator)
        assert self._replay is not None
        self._replay()
        self.cache.placement = self.where


class BatchCapture:
    """Chooses the recorded pass for a step, if there is to be one."""

    def __init__(self, model: CausalLM, cache: PagedCache):
        self.model, self.cache = model, cache
        self._store = capture.CapturedSteps()
        self._uses: Counter[Hashable] = Counter()
        self._why = ""  # nothing is recorded
        self._capture: capture.StepCapture | None = None

    def look(self) -> None:
        """See whether the model is still what it was; for whenever a request comes."""
        self._why = capture.loop_plan(self.model).why
        if row_adapters(self.model) is not None:
            self._why = "which rows take which adapter changes from step to step"
        if self._why:
            capture.log_once(self.model, self._why)
        else:
            self._capture = self._store.open(self.model, self.model.device)

    def loaded(
        self, rows: Sequence[Row], spans: Sequence[Span], ids: Sequence[int], before: Tensor | None
    ) -> StaticBatch | None:
        """The pass for these rows with its inputs set; None if it is to be run plainly."""
        if self._why or self._capture is None or len(spans) > MAX_ROWS:
            return None
        chain, sampled = shared_chain(rows), rows[0].generator is not None
        if any((row.generator is not None) != sampled or row.reads_scores for row in rows):
            chain = None  # the scores of the pass are gone with it
        pages = max(MIN_PAGES, capture.rounded(max(-(-span.end // self.cache.page_size) for span in spans)))
        key = (1 << (len(spans) - 1).bit_length(), pages, chain, sampled and chain is not None)
        self._uses[key] += 1
        static = self._store.use(key)
        if static is None and self._uses[key] >= WORTH_USES:
            return self._made(key, spans, ids, before)
        if isinstance(static, StaticBatch):
            static.load(spans, ids, before)
            return static
        return None

    def _made(self, key: Any, spans: Sequence[Span], ids: Sequence[int], before: Tensor | None) -> StaticBatch | None:
        assert self._capture is not None
        try:
            with torch.inference_mode(False), torch.no_grad():
                static = StaticBatch(self.model, self.cache, *key)
                static.load(spans, ids, before)
                static.record(self._capture)
        except Exception as e:  # memory, or an operator that cannot be recorded: once is enough
            self._store.clear()
            self._why = capture.reason_of(e)
            capture.log_once(self.model, self._why)
            return None
        self._store.entries[key] = static
        self._store.trim()
        return static
