"""Many requests through one model: rows that finish leave, waiting ones enter, and a step runs whoever is there.

This is what a server drives. Source: arXiv:2309.06180 (paged memory); scheduling by the step is the idea of Orca
(Yu et al., OSDI 2022).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import InputError, NumericalError
from gemmakit.generation.ranges import is_whole
from gemmakit.pytorch.cache.paged import PagedCache, Span, bytes_per_token
from gemmakit.pytorch.cache.pages import PagePool
from gemmakit.pytorch.decode.requests import Request, Row, choose, prepare_row
from gemmakit.pytorch.decode.sampling import NO_TOKEN
from gemmakit.pytorch.decode.scheduler import Part, Scheduler


@dataclass(frozen=True)
class Event:
    """A request got a token, or ended, or both.

    finish_reason: "eos", "stop" (a stop string or criterion), "length" (of tokens or time), "cancelled", "error"; None
    while it goes on. token: None where it ended without a new one. error: what went wrong, for "error".
    """

    id: int
    token: int | None
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass
class _Outcome:
    """What a pass gave a part: its token and the scores (1, V) behind it, or an error; nothing for an inner part."""

    part: Part
    token: int | None = None
    scores: Tensor | None = None
    error: Exception | None = None


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

    Raises:
        InputError: a size that is no whole number above 0. NotEnoughMemory: the cache does not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch_size: int = 8,
        page_size: int = 16,
        cache_tokens: int | None = None,
        cache_bytes: int | None = None,
        prefill_tokens: int = 512,
        share_prefixes: bool = True,
    ):
        sizes = {"max_batch_size": max_batch_size, "page_size": page_size, "prefill_tokens": prefill_tokens}
        check_sizes(**sizes, cache_tokens=cache_tokens, cache_bytes=cache_bytes)
        if cache_tokens is None and cache_bytes is None:
            cache_tokens = max(1024 * max_batch_size, model.config.max_position_embeddings)
        dtype = model.get_input_embeddings().weight.dtype
        pages = _pages(page_size, cache_tokens, cache_bytes, bytes_per_token(model.config, dtype))
        devices = [layer.input_layernorm.weight.device for layer in model.model.layers]
        self.model = model
        self.cache = PagedCache(model.config, pages, page_size, dtype, devices)
        self.scheduler = Scheduler(PagePool(pages, page_size, share_prefixes), max_batch_size, prefill_tokens)
        self._rows: dict[int, Row] = {}
        self._next_id = 0
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
            settings out of range. Nothing is queued then.
        """
        request = request if isinstance(request, Request) else Request(request)
        return self.queue(prepare_row(self.model, request, self._next_id))

    def queue(self, row: Row) -> int:
        """As add, for a request that is checked already; its number must be above those before."""
        self.scheduler.add(row.sequence)
        self._rows[row.id] = row
        self._next_id = row.id + 1
        return row.id

    def cancel(self, id: int) -> bool:
        """End a request; its pages are free at once, and the next step() tells. False if it is not there (any more)."""
        row = self._rows.pop(id, None)
        if row is None:
            return False
        self.scheduler.remove(row.sequence)
        self._events.append(Event(id, None, "cancelled"))
        return True

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Run every row that can run by one token or part of a prompt; what came of it, at most one token a request.

        What a request's own processors and criteria raise, and scores with no finite number, end that request with an
        "error". Anything else (a KeyboardInterrupt, memory) is raised and leaves everything as it was: step again.
        """
        # Outcomes of a step that was interrupted are settled first. Here is also where a step would be settled one
        # later than it is run, to keep a device busy: planning needs counts, not tokens.
        if not self._outcomes and self.scheduler.has_work:
            self._outcomes = self._run()
        while self._outcomes:
            self._settle()
        events, self._events = self._events, []
        return events

    # -- inside ----------------------------------------------------------------------------------------------------

    def _run(self) -> deque[_Outcome]:
        """One step on the device. Nothing but pages is taken until it is settled."""
        step = self.scheduler.plan()
        fresh = self.scheduler.pool.fresh
        self.cache.clear(fresh)
        fresh.clear()
        passes = [(part,) for part in step.prefill] + ([step.decode] if step.decode else [])
        logits = torch.cat([self._forward(parts) for parts in passes])
        parts = [part for parts in passes for part in parts]
        picking = [i for i, part in enumerate(parts) if part.last]
        outcomes = [_Outcome(part) for part in parts]
        if picking:
            rows = [self._rows[parts[i].sequence.id] for i in picking]
            tokens, scores, errors = choose(rows, logits if len(picking) == len(parts) else logits[picking])
            for n, i in enumerate(picking):
                outcomes[i] = _Outcome(parts[i], tokens[n], scores[n : n + 1], errors.get(n))
        return deque(outcomes)

    def _forward(self, parts: Sequence[Part]) -> Tensor:
        """One pass over one part of any length, or several of one token each. Logits (R, V) of their last tokens."""
        where = self.cache.place([Span(part.sequence.holding.pages, part.start, part.end) for part in parts])
        several = len(parts) > 1
        ids = [part.sequence.tokens[part.start : part.end] for part in parts]
        out = self.model(
            input_ids=torch.tensor(ids, device=self.model.device),
            attention_mask=where.mask if several else None,
            position_ids=where.positions if several else None,
            past_key_values=self.cache,
            use_cache=True,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

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
            self._events.append(event)
            if event.finish_reason is not None:
                del self._rows[row.id]
                self.scheduler.remove(row.sequence)

    def _judge(self, row: Row, outcome: _Outcome) -> Event:
        token, error, reason = outcome.token, outcome.error, None
        assert token is not None and outcome.scores is not None
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


def check_sizes(*, cache_tokens: int | None = None, cache_bytes: int | None = None, **sizes: Any) -> None:
    if cache_tokens is not None and cache_bytes is not None:
        raise InputError("cache_tokens and cache_bytes both say how large the cache is: give one of them.")
    optional = {"cache_tokens": cache_tokens, "cache_bytes": cache_bytes}
    sizes.update({name: size for name, size in optional.items() if size is not None})
    for name, size in sizes.items():
        if not is_whole(size) or size < 1:
            raise InputError(f"{name} is {size!r}; it must be a whole number >= 1.")
