"""Many requests through one model: rows that finish leave, waiting ones enter, and a step runs whoever is there.

This is what a server drives. Source: arXiv:2309.06180 (paged memory); scheduling by the step is the idea of Orca
(Yu et al., OSDI 2022).
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gemmakit.checkpoint.memory import require_memory
from gemmakit.checks import Whole, check
from gemmakit.errors import InputError, NumericalError, QueueFull
from gemmakit.pytorch.cache.paged import PagedCache, bytes_per_token
from gemmakit.pytorch.cache.pages import PagePool
from gemmakit.pytorch.decode.batch.assistant import Assistant, check_assisted
from gemmakit.pytorch.decode.batch.capture import BatchCapture
from gemmakit.pytorch.decode.batch.choose import likeliest
from gemmakit.pytorch.decode.batch.drafts import Speculation, speculation
from gemmakit.pytorch.decode.batch.events import EngineStats, Event
from gemmakit.pytorch.decode.batch.requests import Request, Row, prepare_rows
from gemmakit.pytorch.decode.batch.runner import Outcome, Runner, Started
from gemmakit.pytorch.decode.batch.scheduler import Scheduler, Step
from gemmakit.pytorch.decode.invariance import invariance
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import NO_TOKEN
from gemmakit.pytorch.row_adapters import row_adapters

OPTIONAL = ("cache_tokens", "cache_bytes", "max_waiting", "max_waiting_tokens")


class BatchEngine:
    """Runs requests side by side; each gets the tokens it would get alone, up to the rounding of the dtype.

    All memory for keys and values is taken here, once. One thread at a time: a server owns the engine in one thread
    and passes messages.

    Args:
        model: a causal language model.
        max_batch_size: requests that run at a time; the others wait, first come, first served.
        page_size: tokens a page of the cache.
        cache_tokens, cache_bytes: room for the tokens of all running requests together; by default 1024 tokens for
            each of them, and at least one whole context. When it runs out, the youngest waits, its tokens kept.
        prefill_tokens: prompt tokens a step, so that a long prompt does not hold up the others.
        share_prefixes: let requests that begin alike share what was computed. The time to the first token then tells
            whether somebody asked the same before: False where callers must not learn that of each other.
        overlap: start a step before the tokens of the last one are read, so that an accelerator never waits for the
            host; by default on accelerators. A request that ends is then run for one token in vain.
        cuda_graphs: replay decoding passes that come often, where the device can.
        max_waiting, max_waiting_tokens: answers that may wait, beside those for which there is room to run, and the
            prompt tokens of all that wait; None for no limit. One that finds nobody waiting may have any length.
        batch_invariant: give each request the same bits whatever else runs; by default on the CPU, where nothing is
            against it. The attribute of this name is what was decided, and why.
        speculate: let requests check tokens that their own text so far proposes, so that a step may give several; by
            default where that changes no bit, for batch_invariant. The attribute says whether it does, and why not.
        assistant_model: a smaller model of the same vocabulary that proposes tokens where they speculate, to all that
            ask in one pass, while it pays. It reads prompts too, and cache_tokens and cache_bytes hold its keys.

    Raises:
        InputError: a size that is no whole number above 0; batch_invariant, speculate or assistant_model where it
        cannot be had; an assistant of another vocabulary or on another device.
        NotEnoughMemory: the cache does not fit.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_batch_size: int = 8,
        page_size: int = 16,
        cache_tokens: int | None = None,
        cache_bytes: int | None = None,
        prefill_tokens: int = 512,
        share_prefixes: bool = True,
        overlap: bool | None = None,
        cuda_graphs: bool = True,
        max_waiting: int | None = None,
        max_waiting_tokens: int | None = None,
        batch_invariant: bool | None = None,
        speculate: bool | None = None,
        assistant_model: CausalLM | None = None,
    ):
        sizes = {"max_batch_size": max_batch_size, "page_size": page_size, "prefill_tokens": prefill_tokens}
        limits = {"max_waiting": max_waiting, "max_waiting_tokens": max_waiting_tokens}
        check_sizes(**sizes, **limits, cache_tokens=cache_tokens, cache_bytes=cache_bytes)
        if cache_tokens is None and cache_bytes is None:
            cache_tokens = max(1024 * max_batch_size, model.config.max_position_embeddings)
        devices = [layer.input_layernorm.weight.device for layer in model.model.layers]
        self._overlap = devices[0].type != "cpu" if overlap is None else overlap
        self.batch_invariant = invariance(model, batch_invariant)
        if batch_invariant and self.batch_invariant.why:
            raise InputError(f"batch_invariant is True, but {self.batch_invariant.why}: leave it out.")
        self.speculate = speculation(self.batch_invariant, self._overlap, speculate)
        if speculate and self.speculate.why:
            raise InputError(f"speculate is True, but {self.speculate.why}: leave it out.")
        models = [model]
        if assistant_model is not None:
            check_assisted(assistant_model, model, self.speculate)
            models.append(assistant_model)
        token_bytes = sum(bytes_per_token(one.config, one.dtype) for one in models)
        pages = _pages(page_size, cache_tokens, cache_bytes, token_bytes)
        if assistant_model is not None:  # before the first of the two caches is taken
            what = f"paged caches of {pages * page_size} tokens for the model and its assistant"
            remedy = "Pass a smaller cache_tokens or max_batch_size."
            require_memory((pages + 1) * page_size * token_bytes, what, remedy=remedy)
        self.model = model
        self.cache = PagedCache(model.config, pages, page_size, model.dtype, devices)
        self.scheduler = Scheduler(PagePool(pages, page_size, share_prefixes), max_batch_size, prefill_tokens)
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._deadlines: list[tuple[float, int]] = []
        self._rows: dict[int, Row] = {}  # by the number of their sequence
        self._requests: dict[int, list[Row]] = {}  # those that have not ended
        self._next_id = self._next_sequence = 0
        self._captured = BatchCapture(model, self.cache) if cuda_graphs else None
        self._runner = Runner(model, self.cache, self._rows, self._captured)
        self._runner.invariant = not self.batch_invariant.why
        pool, self._assistant = self.scheduler.pool, None
        if assistant_model is not None:
            self._assistant = Assistant(assistant_model, model, self._rows, pool, prefill_tokens)
        self._speculation = None if self.speculate.why else Speculation(self._rows, pool, self._assistant)
        self._flight: Started | None = None
        self._next: Started | None = None  # what was started before the tokens of the flight were read
        self._outcomes: deque[Outcome] = deque()
        self._events: list[Event] = []

    # -- the caller's side -----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether step() has anything to do or to tell."""
        return bool(self.scheduler.has_work or self._events)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, the assistant's included; constant."""
        return self.cache.nbytes + (0 if self._assistant is None else self._assistant.cache.nbytes)

    def add(self, request: Request | Sequence[int] | Tensor) -> int:
        """Queue a request, or a prompt with the model's own settings; gives the id that its events carry.

        Raises:
            PromptTooLong: it could not even run alone. InputError, GenerationConfigError, TokenOutOfRange: prompt or
            settings out of range. QueueFull: too many wait. Nothing is queued then.
        """
        request = request if isinstance(request, Request) else Request(request)
        prompt = request.prompt
        self._check_queue(prompt.numel() if isinstance(prompt, Tensor) else len(prompt))
        return self.queue(prepare_rows(self.model, request, self._next_id))

    def queue(self, rows: Sequence[Row]) -> int:
        """As add, for a request that is checked already; its number must be above those before."""
        id = rows[0].id
        self.scheduler.check(rows[0].prompt_length, rows[0].sequence.limit - rows[0].prompt_length)
        for row in rows:
            row.sequence.id = self._next_sequence
            self._next_sequence += 1
            self.scheduler.add(row.sequence)
            self._rows[row.sequence.id] = row
            if row.request.deadline is not None:
                heapq.heappush(self._deadlines, (row.added + row.request.deadline, row.sequence.id))
        for row in rows:
            row.seed()
        self._requests[id], self._next_id = list(rows), id + 1
        self._runner.adapters = row_adapters(self.model)
        if self._captured is not None:
            self._captured.look()
        return id

    def cancel(self, id: int) -> bool:
        """End a request; its pages are free at once, and the next step() tells of each answer. False if it is not there
        (any more).
        """
        rows = list(self._requests.get(id, ()))
        for row in rows:
            self._tell(row, Event(id, None, "cancelled"))
        return bool(rows)

    def stats(self) -> EngineStats:
        """How the engine stands now; cheap."""
        now, pool = self.scheduler, self.scheduler.pool
        used = 1 - pool.idle / pool.pages
        counts = now.prefix_queries, now.prefix_hits, now.preemptions
        proposing = self._speculation, self._assistant
        drafts = [n for one in proposing for n in ((0, 0) if one is None else (one.proposed, one.accepted))]
        return EngineStats(len(now.running), len(now.waiting), used, *counts, *drafts)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Run every row that can run by a token (by several where it speculates) or part of a prompt; what came of it.

        What a request's own processors and criteria raise, and scores with no finite number, end that request with an
        "error". Anything else (a KeyboardInterrupt, memory) is raised and leaves everything as it was: step again.
        """
        self._expire()
        # Outcomes of a step that was interrupted are settled first.
        if not self._outcomes:
            self._launch()
        while self._outcomes:
            self._settle()
        events, self._events = self._events, []
        return events

    # -- inside ----------------------------------------------------------------------------------------------------

    def _check_queue(self, tokens: int) -> None:
        """Raises QueueFull if a prompt of so many tokens would make too many wait."""
        waiting, free = self.scheduler.waiting, self.scheduler.max_batch_size - len(self.scheduler.running)
        if self._max_waiting is not None and len(waiting) >= self._max_waiting + free:
            raise QueueFull(
                f"{len(waiting)} requests wait, and max_waiting is {self._max_waiting}: add it again later."
            )
        if self._max_waiting_tokens is not None and waiting:
            held = sum(len(sequence.tokens) for sequence in waiting)
            if held + tokens > self._max_waiting_tokens:
                raise QueueFull(
                    f"prompts of {held} tokens wait, this one has {tokens}, and max_waiting_tokens is "
                    f"{self._max_waiting_tokens}: add it again later."
                )

    def _expire(self) -> None:
        """End what has waited past its deadline."""
        self.give_up(self._overdue())

    def _overdue(self) -> list[int]:
        """The sequences that wait past their deadline."""
        late: list[int] = []
        while self._deadlines:
            due, id = self._deadlines[0]
            row = self._rows.get(id)
            waits = row is not None and row.started is None
            if waits and due > time.monotonic():
                break
            heapq.heappop(self._deadlines)
            if waits:
                late.append(id)
        return late

    def give_up(self, sequences: Iterable[int]) -> None:
        """End these sequences, as having waited too long."""
        for id in sequences:
            row = self._rows[id]
            self._tell(row, Event(row.id, None, "timeout"))

    def _launch(self) -> None:
        """Start a step unless one is under way, and where possible the one after it; then read the first."""
        if self._flight is not None and not any(part.sequence.id in self._rows for part in self._flight.parts):
            self._flight = self._next = None  # all it was for have ended meanwhile
        if self._flight is None:
            if not self.scheduler.has_work:
                return
            step = self.scheduler.plan()
            self._flight = self._start(step if self._speculation is None else self._speculation.drafted(step))
        if self._overlap and self._next is None:
            self._next = self._start_ahead(self._flight)
        self._outcomes = self._flight.read()
        if self._speculation is not None:
            self._speculation.learn(self._flight.parts, [one.part for one in self._outcomes if one.token is not None])
        self._flight, self._next = self._next, None

    def _start_ahead(self, flight: Started) -> Started | None:
        """The step after `flight`, whose tokens the host does not know yet."""
        if any(row.ids is not None for part in flight.parts if (row := self._rows.get(part.sequence.id)) is not None):
            return None  # processors and criteria of its own are shown each token before the next is chosen
        step = self.scheduler.ahead(flight.parts)
        return None if step is None else self._start(step, flight)

    def _start(self, step: Step, before: Started | None = None) -> Started:
        fresh = self.scheduler.pool.fresh
        self.cache.clear(fresh)
        fresh.clear()
        for part in (*step.prefill, *step.decode):
            row = self._rows[part.sequence.id]
            row.started = time.monotonic() if row.started is None else row.started
        return self._runner.start(step.prefill, step.decode, before)

    def _settle(self) -> None:
        """Write the next outcome down."""
        outcome = self._outcomes[0]
        row = self._rows.get(outcome.part.sequence.id)
        event = None if row is None or outcome.token is None else self._judge(row, outcome)
        self._outcomes.popleft()  # only now: a criterion may be interrupted
        if row is None:  # cancelled meanwhile
            return
        if row.prompt_logprobs is not None:
            row.prompt_logprobs += outcome.prompt_logprobs
            row.sequence.whole = len(row.prompt_logprobs) < row.prompt_length
        if event is None or event.error is None:
            self.scheduler.advance(outcome.part, outcome.token)
        if event is not None:
            self._tell(row, event)

    def _judge(self, row: Row, outcome: Outcome) -> Event:
        token, error, reason, text = outcome.token, outcome.error, None, ""
        assert token is not None
        if error is None and token == NO_TOKEN:
            error = NumericalError(
                f"request {row.id}, step {row.new_tokens + 1}: no token has a finite score (NaN or infinity in the "
                "weights or logits, or every token forbidden). Check weights and processors, or use float32."
            )
        if error is None:
            try:
                reason, text = row.ends(token, outcome.scores)
            except Exception as e:
                error = e
        if error is not None:
            return Event(row.id, None, "error", error)
        if row.silent:
            return Event(row.id, None, "length")
        if outcome.logprobs is None:
            return Event(row.id, token, reason, text=text)
        logprob, top = likeliest(outcome.logprobs, token, row.logprobs or 0)
        return Event(row.id, token, reason, text=text, logprob=logprob, top_logprobs=top)

    def _tell(self, row: Row, event: Event) -> None:
        """Give an event of a row to the caller; a row that has ended is forgotten."""
        if event.token is not None and row.spoke is None:
            row.spoke = time.monotonic()
        if row.prompt_logprobs is not None and len(row.prompt_logprobs) == row.prompt_length:
            event = replace(event, prompt_logprobs=row.prompt_logprobs)
            row.prompt_logprobs = None
        self._events += row.told(event)
        if event.finish_reason is not None:
            self._forget(row)

    def _forget(self, row: Row) -> None:
        """Its pages are free at once."""
        del self._rows[row.sequence.id]
        self.scheduler.remove(row.sequence)
        siblings = self._requests[row.id]
        siblings.remove(row)
        if not siblings:
            del self._requests[row.id]


def _pages(page_size: int, cache_tokens: int | None, cache_bytes: int | None, token_bytes: int) -> int:
    """Pages beside the one that is always zero."""
    if cache_bytes is None:
        assert cache_tokens is not None
        return -(-cache_tokens // page_size)
    pages = cache_bytes // (page_size * token_bytes) - 1
    if pages < 1:
        raise InputError(
            f"cache_bytes is {cache_bytes}, but the smallest cache, 2 pages of {page_size} tokens, takes "
            f"{2 * page_size * token_bytes} bytes: raise it, or choose a smaller page_size."
        )
    return pages


def check_sizes(**sizes: Any) -> None:
    """Raises InputError for one that is no whole number above 0; those in OPTIONAL may be None."""
    if sizes.get("cache_tokens") is not None and sizes.get("cache_bytes") is not None:
        raise InputError("cache_tokens and cache_bytes both say how large the cache is: give one of them.")
    for name, size in sizes.items():
        if size is not None or name not in OPTIONAL:
            check(name, size, Whole(1), InputError)
