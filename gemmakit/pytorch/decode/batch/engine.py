"""Many requests through one model: rows that finish leave, waiting ones enter, and a step runs whoever is there.

This is what a server drives. Source: arXiv:2309.06180 (paged memory); scheduling by the step is the idea of Orca
(Yu et al., OSDI 2022).
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemmakit.checks import Whole, check
from gemmakit.errors import InputError, NumericalError, QueueFull
from gemmakit.pytorch.cache.paged import PagedCache, Span, bytes_per_token, sent
from gemmakit.pytorch.cache.pages import PagePool
from gemmakit.pytorch.decode.batch.capture import BatchCapture
from gemmakit.pytorch.decode.batch.events import EngineStats, Event
from gemmakit.pytorch.decode.batch.requests import Request, Row, choose_tokens, prepare_row
from gemmakit.pytorch.decode.batch.scheduler import Part, Scheduler
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import NO_TOKEN
from gemmakit.pytorch.decode.step import forward
from gemmakit.pytorch.decode.stream import HostCopy

OPTIONAL = ("cache_tokens", "cache_bytes", "max_waiting", "max_waiting_tokens")


@dataclass
class _Outcome:
    """What a pass gave a part: its token and the scores (1, V) behind it, or an error; nothing for an inner part."""

    part: Part
    token: int | None = None
    scores: Tensor | None = None
    error: Exception | None = None


@dataclass
class _Choice:
    """The next tokens of some parts, on the device and on their way to the host."""

    parts: Sequence[Part]
    tokens: Tensor
    copy: HostCopy
    scores: Tensor | None
    errors: dict[int, Exception]


@dataclass
class _Started:
    """A step that was started: everything that ran, and what was chosen."""

    parts: tuple[Part, ...]
    choices: list[_Choice]

    @property
    def tokens(self) -> Tensor:
        return self.choices[0].tokens if len(self.choices) == 1 else torch.cat([c.tokens for c in self.choices])

    @property
    def order(self) -> dict[int, int]:
        """Where in `tokens` a sequence's is."""
        return {part.sequence.id: i for i, part in enumerate(part for c in self.choices for part in c.parts)}

    def read(self) -> deque[_Outcome]:
        """Waits for the tokens."""
        found: dict[int, _Outcome] = {}
        for choice in self.choices:
            for i, (part, token) in enumerate(zip(choice.parts, choice.copy.read(), strict=True)):
                scores = None if choice.scores is None else choice.scores[i : i + 1]
                found[part.sequence.id] = _Outcome(part, token, scores, choice.errors.get(i))
        return deque(found.get(part.sequence.id, _Outcome(part)) for part in self.parts)


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
        batch_invariant: give each request the same bits whatever else runs; by default on the CPU.

    Raises:
        InputError: a size that is no whole number above 0. NotEnoughMemory: the cache does not fit.
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
    ):
        sizes = {"max_batch_size": max_batch_size, "page_size": page_size, "prefill_tokens": prefill_tokens}
        limits = {"max_waiting": max_waiting, "max_waiting_tokens": max_waiting_tokens}
        check_sizes(**sizes, **limits, cache_tokens=cache_tokens, cache_bytes=cache_bytes)
        if cache_tokens is None and cache_bytes is None:
            cache_tokens = max(1024 * max_batch_size, model.config.max_position_embeddings)
        dtype = model.dtype
        pages = _pages(page_size, cache_tokens, cache_bytes, bytes_per_token(model.config, dtype))
        devices = [layer.input_layernorm.weight.device for layer in model.model.layers]
        self.model = model
        self.cache = PagedCache(model.config, pages, page_size, dtype, devices)
        self.scheduler = Scheduler(PagePool(pages, page_size, share_prefixes), max_batch_size, prefill_tokens)
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._deadlines: list[tuple[float, int]] = []
        self._rows: dict[int, Row] = {}
        self._next_id = 0
        self._overlap = devices[0].type != "cpu" if overlap is None else overlap
        self._captured = BatchCapture(model, self.cache) if cuda_graphs else None
        self._flight: _Started | None = None
        self._next: _Started | None = None  # what was started before the tokens of the flight were read
        self._outcomes: deque[_Outcome] = deque()
        self._events: list[Event] = []

    # -- the caller's side -----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether step() has anything to do or to tell."""
        return bool(self.scheduler.has_work or self._events)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache; constant."""
        return self.cache.nbytes

    def add(self, request: Request | Sequence[int] | Tensor) -> int:
        """Queue a request, or a prompt with the model's own settings; gives the id that its events carry.

        Raises:
            PromptTooLong: it could not even run alone. InputError, GenerationConfigError, TokenOutOfRange: prompt or
            settings out of range. QueueFull: too many wait. Nothing is queued then.
        """
        request = request if isinstance(request, Request) else Request(request)
        prompt = request.prompt
        self._check_queue(prompt.numel() if isinstance(prompt, Tensor) else len(prompt))
        return self.queue(prepare_row(self.model, request, self._next_id))

    def queue(self, row: Row) -> int:
        """As add, for a request that is checked already; its number must be above those before."""
        self.scheduler.add(row.sequence)
        self._rows[row.id] = row
        if row.deadline is not None:
            heapq.heappush(self._deadlines, (row.added + row.deadline, row.id))
        self._next_id = row.id + 1
        if self._captured is not None:
            self._captured.look()
        return row.id

    def cancel(self, id: int) -> bool:
        """End a request; its pages are free at once, and the next step() tells. False if it is not there (any more)."""
        row = self._rows.pop(id, None)
        if row is None:
            return False
        self.scheduler.remove(row.sequence)
        self._events.append(Event(id, None, "cancelled", usage=row.usage))
        return True

    def stats(self) -> EngineStats:
        """How the engine stands now; cheap."""
        now, pool = self.scheduler, self.scheduler.pool
        used = 1 - pool.idle / pool.pages
        counts = now.prefix_queries, now.prefix_hits, now.preemptions
        return EngineStats(len(now.running), len(now.waiting), used, *counts)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Run every row that can run by one token or part of a prompt; what came of it, at most one token a request.

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
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, id = heapq.heappop(self._deadlines)
            row = self._rows.get(id)
            if row is not None and row.started is None:
                del self._rows[id]
                self.scheduler.remove(row.sequence)
                self._events.append(Event(id, None, "timeout", usage=row.usage))

    def _launch(self) -> None:
        """Start a step unless one is under way, and where possible the one after it; then read the first."""
        if self._flight is not None and not any(part.sequence.id in self._rows for part in self._flight.parts):
            self._flight = self._next = None  # all it was for have ended meanwhile
        if self._flight is None:
            if not self.scheduler.has_work:
                return
            step = self.scheduler.plan()
            for part in (*step.prefill, *step.decode):
                row = self._rows[part.sequence.id]
                row.started = row.started or time.monotonic()
            self._flight = self._start(step.prefill, step.decode)
        if self._overlap and self._next is None:
            self._next = self._start_ahead(self._flight)
        self._outcomes = self._flight.read()
        self._flight, self._next = self._next, None

    def _start_ahead(self, flight: _Started) -> _Started | None:
        """The step after `flight`, whose tokens the host does not know yet."""
        if any(row.ids is not None for part in flight.parts if (row := self._rows.get(part.sequence.id)) is not None):
            return None  # processors and criteria of its own are shown each token before the next is chosen
        step = self.scheduler.ahead(flight.parts)
        return None if step is None else self._start((), step.decode, flight)

    def _start(self, prefill: Sequence[Part], decode: Sequence[Part], before: _Started | None = None) -> _Started:
        """One step on the device. Nothing but pages is taken until it is settled."""
        fresh = self.scheduler.pool.fresh
        self.cache.clear(fresh)
        fresh.clear()
        ran: list[tuple[Sequence[Part], Tensor]] = [((part,), self._forward((part,))) for part in prefill]
        choices: list[_Choice] = []
        if decode:
            static = self._replayed(decode, before)
            if isinstance(static, _Choice):
                choices.append(static)
            else:
                ran.append((decode, self._forward(decode, before) if static is None else static))
        if any(part.last for parts, _ in ran for part in parts):
            choices.insert(0, self._choose(ran))
        return _Started((*prefill, *decode), choices)

    def _choose(self, ran: Sequence[tuple[Sequence[Part], Tensor]]) -> _Choice:
        """The next tokens of the parts that are the last of their prompts."""
        parts = [part for group, _ in ran for part in group]
        logits = torch.cat([logits for _, logits in ran]) if len(ran) > 1 else ran[0][1]
        picking = [i for i, part in enumerate(parts) if part.last]
        rows = [self._rows[parts[i].sequence.id] for i in picking]
        if len(picking) < len(parts):
            logits = logits[sent(picking, logits.device)]
        tokens, scores, errors = choose_tokens(rows, logits)
        return _Choice([parts[i] for i in picking], tokens, HostCopy(tokens), scores, errors)

    def _replayed(self, parts: Sequence[Part], before: _Started | None) -> _Choice | Tensor | None:
        """What the recorded pass gives: tokens, or logits where rows choose apart; None where there is no such pass."""
        if self._captured is None or not all(part.last for part in parts):
            return None
        rows = [self._rows[part.sequence.id] for part in parts]
        ids, tokens = self._inputs(parts, before)
        static = self._captured.loaded(rows, _spans(parts), ids, tokens)
        if static is None:
            return None
        static.run(rows)
        if static.chosen_by is None:
            assert static.logits is not None
            return static.logits[: len(rows)]
        tokens = static.tokens[: len(rows)]
        return _Choice(parts, tokens, HostCopy(tokens), None, {})

    @staticmethod
    def _inputs(parts: Sequence[Part], before: _Started | None) -> tuple[list[int], Tensor | None]:
        """The one token of each part; or its place among those that are still on the device, and these."""
        if before is None:
            return [part.sequence.tokens[part.start] for part in parts], None
        order = before.order
        return [order[part.sequence.id] for part in parts], before.tokens

    def _forward(self, parts: Sequence[Part], before: _Started | None = None) -> Tensor:
        """One pass over one part of any length, or several of one token each. Logits (R, V) of their last tokens."""
        where = self.cache.place(_spans(parts))
        several = len(parts) > 1
        if before is None:
            ids = [part.sequence.tokens[part.start : part.end] for part in parts]
            given = sent(ids, self.model.device)
        else:
            places, tokens = self._inputs(parts, before)
            assert tokens is not None
            given = tokens[sent(places, tokens.device)].clamp_min(0)[:, None]
        mask, positions = (self.cache.masks(), where.positions) if several else (None, None)
        return forward(self.model, given, self.cache, mask, positions).logits[:, -1]

    def _settle(self) -> None:
        """Write the next outcome down."""
        outcome = self._outcomes[0]
        row = self._rows.get(outcome.part.sequence.id)
        event = None if row is None or outcome.token is None else self._judge(row, outcome)
        self._outcomes.popleft()  # only now: a criterion may be interrupted
        if row is None:  # cancelled meanwhile
            return
        if event is None or event.error is None:
            self.scheduler.advance(outcome.part, outcome.token)
        if event is not None:
            if event.token is not None and row.spoke is None:
                row.spoke = time.monotonic()
            ended = event.finish_reason is not None
            self._events.append(replace(event, usage=row.usage) if ended else event)
            if ended:
                del self._rows[row.id]
                self.scheduler.remove(row.sequence)

    def _judge(self, row: Row, outcome: _Outcome) -> Event:
        token, error, reason = outcome.token, outcome.error, None
        assert token is not None
        if error is None and token == NO_TOKEN:
            step = len(row.sequence.tokens) - row.prompt_length + 1
            error = NumericalError(
                f"request {row.id}, step {step}: no token has a finite score (NaN or infinity in the weights or "
                "logits, or every token forbidden). Check weights and processors, or use float32."
            )
        if error is None:
            try:
                reason = row.ends(token, outcome.scores)
            except Exception as e:
                error = e
        return Event(row.id, token, reason) if error is None else Event(row.id, None, "error", error)


def _spans(parts: Sequence[Part]) -> list[Span]:
    return [Span(part.sequence.holding.pages, part.start, part.end) for part in parts]


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
