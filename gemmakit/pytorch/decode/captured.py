"""The token loop's step on fixed memory, so that an accelerator can replay it: model, processors, sampler and eos.

It runs the same `forward` over a static cache whose length is on the device; where it is impossible, `recorded_step`
says why and the loop steps as ever. Axis letters: R rows, V vocabulary, T places.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from gemmakit.pytorch.cache import Cache, DynamicCache, StaticCache
from gemmakit.pytorch.decode import graphs
from gemmakit.pytorch.decode.plan import Plan
from gemmakit.pytorch.decode.processors import ScoresOnly
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.rows import Rows
from gemmakit.pytorch.decode.sampling import greedy, sampler
from gemmakit.pytorch.decode.step import Step, forward

# Recording runs the step about four times over.
WORTH_STEPS = 8
MIN_PLACES = 64


class Queue(Protocol):
    def send(self, *message: Tensor) -> None: ...


class Running(Protocol):
    """What the loop lets a step see."""

    rows: Rows
    plan: Plan
    ends: Tensor

    @property
    def queue(self) -> Queue: ...


class StaticStep:
    """Rows of fixed number and room, and one step on them.

    The step runs `tokens`, writes what it chose into `tokens` and `buffer`, moves on by one place, and leaves the
    tokens and how each row stands in `message`. Nothing of it is read or decided on the host. Nothing is allocated that
    outlives it.
    """

    def __init__(self, model: Any, rows: int, places: int, padded: bool, plan: Plan):
        device = model.device

        def made(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.model, self.places = model, places
        self.cache = StaticCache(model.config, max_cache_len=places)
        self.tokens, self.buffer, self.message = made(rows, 1), made(rows, places), made(2 * rows)
        self.ends = self.message[rows:]
        self.place = made(1)  # where the tokens go in the cache
        self.mask = made(rows, places, dtype=torch.bool) if padded else None
        self.positions = made(rows, 1) if padded else None
        sampled = plan.config.do_sample
        self.noise = made(rows, model.config.vocab_size, dtype=torch.float32) if sampled else None
        # What is kept has nothing of the call that it came with but how tokens are chosen and end.
        self.chosen_by = Step(
            processors=tuple(plan.processors),
            pick=greedy if self.noise is None else sampler(lambda like: cast(Tensor, self.noise)),
            pad=plan.pad,
            eos=None if plan.eos is None else plan.eos.clone(),
        )
        self._replay: graphs.Step | None = None

    def record(self, recorder: graphs.Recorder) -> None:
        for mask in (self.mask, self.noise):
            if mask is not None:
                mask.fill_(1)
        self.step()  # the cache takes its memory, in the dtype that the model computes in
        self.place.zero_()
        self._replay = recorder.record(self.step)

    @property
    def nbytes(self) -> int:
        own = (self.tokens, self.buffer, self.message, self.mask, self.positions, self.noise)
        return self.cache.nbytes + sum(t.nbytes for t in own if t is not None)

    @property
    def ids(self) -> Tensor:
        """Processors that are recorded read scores alone."""
        return self.tokens

    def append(self, token: Tensor) -> Tensor:
        torch.clamp(token[:, None], min=0, out=self.tokens)
        self.place += 1
        if self.positions is not None:
            self.positions += 1
        self.buffer.index_copy_(1, self.place, self.tokens)
        return self.tokens

    def step(self) -> None:
        out = forward(self.model, self.tokens, self.cache, self.mask, self.positions, cache_position=self.place)
        token, scores = self.chosen_by.choose(self.ids, out.logits[:, -1])
        token, ends = self.chosen_by.append(self, token, scores, self.ends)
        self.message[: len(token)] = token
        self.ends.copy_(ends)

    # -- one call --------------------------------------------------------------------------------------------------

    def host(self, prompt: Prompt, copies: int) -> Prompt:
        """The prompt with this cache to run it into, where it has as many rows."""
        self.cache.reset()
        return prompt if copies > 1 else replace(prompt, cache=self.cache)

    def take_over(self, run: Running) -> Callable[[], None]:
        """Take the rows over, their prompt run and their first token chosen; what runs a step of them."""
        rows, at = run.rows, run.rows.length - 1
        held = rows.cache
        if held is not None and held is not self.cache:
            for i, (k, v) in enumerate(held):
                self.cache.update(k, v, i)
            held.layers.clear()
        self.place.fill_(at)
        self.tokens.copy_(rows.buffer[:, at : at + 1])
        self.buffer[:, : at + 1].copy_(rows.ids)
        self.ends.copy_(run.ends)
        if self.mask is not None and self.positions is not None:
            assert rows.mask is not None and rows.positions is not None
            self.mask.fill_(True)
            self.mask[:, :at].copy_(rows.mask[:, :at])
            self.positions.copy_(rows.positions[:, at : at + 1])
        rows.buffer, rows.cache = self.buffer[:, : rows.total], self.cache

        def advance() -> None:
            if self.noise is not None:
                run.plan.noise.fill(self.noise)  # outside the graph: the draws are those of the plain step
            self.replay()
            rows.length += 1
            run.queue.send(self.message)

        return advance

    def hand_back(self, run: Running, like: Cache | None) -> None:
        """Leave the rows with tokens of their own, and with what the cache holds copied into `like`."""
        rows = run.rows
        rows.buffer = rows.buffer[:, : rows.length].clone()
        self.cache.settle(rows.length - 1)
        if like is not None:
            like.reset()
            for i, (k, v) in enumerate(self.cache):
                like.update(k, v, i)
        rows.cache = like

    def replay(self) -> None:
        assert self._replay is not None
        self._replay()


@contextmanager
def recorded_step(model: Any, prompt: Prompt, plan: Plan) -> Generator[StaticStep | None]:
    """The recorded step for a call, recorded now if it was not yet; None, and a line in the log, where there is none.

    Whatever goes wrong meanwhile, no half-written memory is used again.
    """
    reason = why_not(model, prompt, plan)
    store = graphs.kept(model)
    if reason is None and not store.lock.acquire(blocking=False):
        reason = "another call is using the model's recorded steps"
    if reason is not None:
        graphs.say(model, reason)
        yield None
        return
    try:
        yield _static_step(model, prompt, plan, store)
        store.trim()
    except GeneratorExit:  # the caller has seen enough; the steps are whole
        store.trim()
        raise
    except BaseException:
        store.clear()
        raise
    finally:
        store.lock.release()


def why_not(model: Any, prompt: Prompt, plan: Plan) -> str | None:
    """Why the steps of this call are not replayed, in words; None if they are."""
    if not plan.config.cuda_graphs:
        return "cuda_graphs is False"
    reason = graphs.why_not(model) or _of_call(prompt, plan)
    if reason is None and (torch.is_autocast_enabled(model.device.type) or torch.compiler.is_compiling()):
        return "autocast or a compiler is at work"
    return reason


def _of_call(prompt: Prompt, plan: Plan) -> str | None:
    if prompt.given or type(prompt.cache) not in (DynamicCache, StaticCache):
        kind = "none" if prompt.cache is None else f"a {type(prompt.cache).__name__}"
        return f"the cache is {'the one that was passed' if prompt.given else kind}"
    if prompt.embeds is not None:
        return "the prompt is embeddings"
    others = [type(p).__name__ for p in plan.processors if not isinstance(p, ScoresOnly)]
    if others or plan.criteria:
        others += [type(c).__name__ for c in plan.criteria]
        return f"{', '.join(others)} may need the host"
    recorded = [name for name, kept in vars(plan.record).items() if kept is not None]
    if recorded:
        return f"{', '.join(recorded)} of each step are kept"
    if plan.total - prompt.ids.shape[1] < WORTH_STEPS:
        return f"fewer than {WORTH_STEPS} new tokens are asked for"
    return None


def room(total: int, limit: int) -> int:
    """Places for `total` tokens, rounded up, at least MIN_PLACES; no more than `limit` are needed."""
    return max(min(rounded(total), max(limit, total)), MIN_PLACES)


def rounded(count: int) -> int:
    """Up by a quarter at most, to one of four sizes a power of two: similar calls then share a graph."""
    quarter = 1 << max((count - 1).bit_length() - 3, 0)
    return -(-count // quarter) * quarter


def _static_step(model: Any, prompt: Prompt, plan: Plan, store: graphs.Kept) -> StaticStep | None:
    """The recorded step for so many rows and places, kept or new; None if recording it failed."""
    recorder = store.open(model, model.device)
    rows, padded = len(prompt.ids) * plan.copies, prompt.mask is not None
    places = room(plan.total, model.config.max_position_embeddings)
    eos = None if plan.eos is None else tuple(plan.config.eos_token_ids)
    kind: tuple[Hashable, ...] = (rows, padded, plan.config.do_sample, tuple(plan.processors), plan.pad, eos)
    # A longer one that is there beats a new one, while attention over its empty places costs little.
    lengths = sorted(k[1] for k in store.entries if isinstance(k, tuple) and k[0] == kind)
    fits = [n for n in lengths if places <= n <= 2 * places]
    found = store.use((kind, fits[0])) if fits else None
    if isinstance(found, StaticStep):
        return found
    try:
        with torch.inference_mode(False), torch.no_grad():  # memory that later calls may write to in any mode
            static = StaticStep(model, rows, places, padded, plan)
            static.record(recorder)
    except torch.OutOfMemoryError:
        store.clear()
        graphs.say(model, f"{rows} rows of {places} places and a graph do not fit the memory")
        return None
    except Exception as e:  # whatever it is, steps run one by one meet it too, or they do not
        store.clear()
        store.refusal = graphs.reason_of(e)
        warnings.warn(f"decoding runs step by step: {store.refusal}.", stacklevel=10)
        return None
    store.entries[kind, places] = static
    return static
