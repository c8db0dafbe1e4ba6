"""A decoding step on fixed memory, so that an accelerator replays it; and what is kept of such steps from call to call.

A step that reads and writes fixed memory only is recorded once and replayed afterwards: the host then starts one thing
a token instead of hundreds. It is the loop's step (model, processors, sampler, ends) over a static cache whose length
is on the device; where that is impossible, `call_plan` says why and the loop steps as ever.
Axis letters: R rows, V vocabulary, T places.
"""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from gemmakit.pytorch.cache import Cache, DynamicCache, StaticCache
from gemmakit.pytorch.decode.processors import ScoresOnly
from gemmakit.pytorch.decode.prompt import Prompt, Rows
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import greedy, sampler
from gemmakit.pytorch.decode.step import Plan, Step, forward
from gemmakit.pytorch.kernels.decision import Decision
from gemmakit.rotary import FOLLOW_LENGTH

Runnable = Callable[[], None]
_log = logging.getLogger("gemmakit")
# As many shapes as a chat, a batch job and an evaluation need side by side.
MAX_CAPTURED = 8
# Recording runs the step about four times over.
WORTH_STEPS = 8
MIN_PLACES = 64
STEPWISE, REPLAYED = "step by step", "replayed from a graph"


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

    def __init__(self, model: CausalLM, rows: int, places: int, padded: bool, plan: Plan):
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
        self._replay: Runnable | None = None

    def record(self, capture: StepCapture) -> None:
        for mask in (self.mask, self.noise):
            if mask is not None:
                mask.fill_(1)
        self.step()  # the cache takes its memory, in the dtype that the model computes in
        self.place.zero_()
        self._replay = capture.capture(self.step)

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

    def take_over(self, run: Running) -> Runnable:
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
def recorded_step(model: CausalLM, prompt: Prompt, plan: Plan) -> Generator[StaticStep | None]:
    """The recorded step for a call, recorded now if it was not yet; None, and a line in the log, where there is none.

    Whatever goes wrong meanwhile, no half-written memory is used again.
    """
    why = call_plan(model, prompt, plan).why
    store = captured_steps(model)
    if not why and not store.lock.acquire(blocking=False):
        why = "another call is using the model's recorded steps"
    if why:
        log_once(model, why)
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


def call_plan(model: CausalLM, prompt: Prompt, plan: Plan) -> Decision:
    """How the steps of this call are started."""
    if not plan.config.cuda_graphs:
        return Decision(STEPWISE, "cuda_graphs is False")
    decided = loop_plan(model)
    return decided if decided.why else _decided(_of_call(model, prompt, plan))


def _of_call(model: CausalLM, prompt: Prompt, plan: Plan) -> str | None:
    if prompt.given or type(prompt.cache) not in (DynamicCache, StaticCache):
        kind = "none" if prompt.cache is None else f"a {type(prompt.cache).__name__}"
        return f"the cache is {'the one that was passed' if prompt.given else kind}"
    if prompt.embeds is not None:
        return "the prompt is embeddings"
    others = [type(p).__name__ for p in plan.processors if not isinstance(p, ScoresOnly)]
    if others or plan.criteria:
        others += [type(c).__name__ for c in plan.criteria]
        return f"{', '.join(others)} may need the host"
    recorded = [name for name, kept in vars(plan.outputs).items() if kept is not None]
    if recorded:
        return f"{', '.join(recorded)} of each step are kept"
    if plan.total - prompt.ids.shape[1] < WORTH_STEPS:
        return f"fewer than {WORTH_STEPS} new tokens are asked for"
    if torch.is_autocast_enabled(model.device.type) or torch.compiler.is_compiling():
        return "autocast or a compiler is at work"
    return None


def room(total: int, limit: int) -> int:
    """Places for `total` tokens, rounded up, at least MIN_PLACES; no more than `limit` are needed."""
    return max(min(rounded(total), max(limit, total)), MIN_PLACES)


def rounded(count: int) -> int:
    """Up by a quarter at most, to one of four sizes a power of two: similar calls then share a graph."""
    quarter = 1 << max((count - 1).bit_length() - 3, 0)
    return -(-count // quarter) * quarter


def _static_step(model: CausalLM, prompt: Prompt, plan: Plan, store: CapturedSteps) -> StaticStep | None:
    """The recorded step for so many rows and places, kept or new; None if recording it failed."""
    capture = store.open(model, model.device)
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
            static.record(capture)
    except torch.OutOfMemoryError:
        store.clear()
        log_once(model, f"{rows} rows of {places} places and a graph do not fit the memory")
        return None
    except Exception as e:  # whatever it is, steps run one by one meet it too, or they do not
        store.clear()
        store.refusal = reason_of(e)
        warnings.warn(f"decoding runs step by step: {store.refusal}.", stacklevel=10)
        return None
    store.entries[kind, places] = static
    return static


# -- how a device records, and what is kept of a model -----------------------------------------------------------------


class StepCapture(Protocol):
    """Turns a step into one that costs the host little."""

    budget_bytes: int  # what may be kept between calls

    def capture(self, step: Runnable) -> Runnable:
        """A function that does what `step` does, on the same memory. The step runs a few times meanwhile."""
        ...

    def drain(self) -> None:
        """Wait until nothing that was recorded is running any more."""
        ...


class CudaGraphs:
    """CUDA graphs, captured by hand; those of one model share the memory of what is in between.

    That is sound as long as they run one after another, on one stream, and leave their results in memory of their own.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.budget_bytes = torch.cuda.mem_get_info(device)[1] // 8
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        # One for all: each stream that multiplies takes a workspace of tens of megabytes, for good.
        self._side = torch.cuda.Stream(device)

    def capture(self, step: Runnable) -> Runnable:
        with torch.cuda.device(self.device), _put_right(self.device):
            side = self._side
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                step()  # whatever is compiled, chosen or reserved at a first use is not for a graph
                step()
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Not the pool of a graph that is gone: its memory may be on its way back.
            pool = next((other.pool() for other in self._alive), None)
            _capture(graph, pool, side, step)
        self._alive.add(graph)
        return graph.replay

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)


def _capture(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream, step: Runnable) -> None:
    """Raises what the step raised: ending a capture that it broke raises another error, which says nothing."""
    cause: Exception | None = None
    try:
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                step()
            except Exception as error:
                cause = error
                raise
    except Exception:
        if cause is not None:
            raise cause from None
        raise


@contextmanager
def _put_right(device: torch.device) -> Generator[None]:
    """Undo what a capture that fails leaves behind: its stream as the current one, and a generator that draws no more.

    torch (2.6 to 2.13) ends neither where ending the capture raises: "Offset increment outside graph capture".
    """
    stream = torch.cuda.current_stream(device)
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    drawn = generator.get_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        fresh = torch.Generator(device)
        fresh.set_state(drawn)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise


def reason_of(error: Exception) -> str:
    """Why recording failed, in a line."""
    said = str(error).strip().splitlines()
    return f"recording a step failed ({type(error).__name__}{f': {said[0]}' if said else ''})"


CAPTURES: dict[str, Callable[[torch.device], StepCapture]] = {"cuda": CudaGraphs}


class Captured(Protocol):
    """What is kept: a recorded step and the memory it works on."""

    @property
    def nbytes(self) -> int: ...


class CapturedSteps:
    """The recorded steps of one model, the latest used last. Whoever uses one holds the lock.

    refusal: why recording failed once; it is not tried again then. Copies and pickles of a model begin without any.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entries: OrderedDict[Hashable, Captured] = OrderedDict()
        self.refusal: str | None = None
        self._capture: StepCapture | None = None
        self._identity: tuple[Any, ...] | None = None

    def open(self, model: CausalLM, device: torch.device) -> StepCapture:
        """The capture; forgets everything if the model is not what it was when the steps were recorded."""
        now = _identity(model)
        if self._identity is None or not _same(now, self._identity):
            self.clear()
            self._identity = now
        if self._capture is None:
            self._capture = CAPTURES[device.type](device)
        return self._capture

    def use(self, key: Hashable) -> Captured | None:
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def trim(self) -> None:
        """Let go of the longest unused beyond what may be kept."""
        budget = 0 if self._capture is None else self._capture.budget_bytes
        while self.entries and (len(self.entries) > MAX_CAPTURED or self.nbytes > budget):
            self._drain()
            self.entries.popitem(last=False)

    def clear(self) -> None:
        if self.entries:
            self._drain()
        self.entries.clear()
        self._capture = self._identity = None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def _drain(self) -> None:
        if self._capture is not None:
            self._capture.drain()

    def __deepcopy__(self, memo: Any) -> CapturedSteps:
        return CapturedSteps()

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedSteps, ()


def captured_steps(model: CausalLM) -> CapturedSteps:
    """What is kept of a model's recorded steps."""
    found = model.__dict__.get("_captured_steps")
    if found is None:
        found = model.__dict__["_captured_steps"] = CapturedSteps()
    return found


def loop_plan(model: CausalLM) -> Decision:
    """How a step of greedy decoding or sampling is started, as far as the model decides it."""
    return _decided(_of_model(model))


def _decided(why: str | None) -> Decision:
    return Decision(STEPWISE, why) if why else Decision(REPLAYED)


def _of_model(model: CausalLM) -> str | None:
    device = model.device
    if device.type not in CAPTURES:
        return f"{device.type} has no graphs"
    if any(t.device != device for t in _tensors(model)):
        return "its weights are on several devices or offloaded"
    if captured_steps(model).refusal is not None:
        return captured_steps(model).refusal
    if model.training:
        return "it is in training mode"
    for rope in model.model.ropes:
        if (kind := model.config.rope(rope)["rope_type"]) in FOLLOW_LENGTH:
            return f"rope type {kind} reads the length on the host"
    if model.config.enable_moe_block:
        return "which experts a step reads is asked on the host"
    if model.config.attn_implementation == "flex_attention":
        return "flex_attention makes its blocks anew each step"
    return next((reason for module in model.modules() if (reason := _foreign(module))), None)


def _foreign(module: nn.Module) -> str | None:
    """Why a replay might leave out something that this module does."""
    kind = type(module)
    if kind.__module__.split(".")[0] not in ("gemmakit", "torch"):
        return f"{kind.__module__}.{kind.__name__} is another library's"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"a {kind.__name__} has hooks"
    if "forward" in module.__dict__:
        return f"the forward of a {kind.__name__} was replaced"
    return None


def log_once(model: CausalLM, reason: str) -> None:
    """Log, once a model and reason, that steps run one by one."""
    said: set[str] = model.__dict__.setdefault("_said", set())
    if reason not in said:
        said.add(reason)
        _log.debug("decoding runs step by step: %s", reason)


def _tensors(model: CausalLM) -> Iterator[Tensor]:
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _identity(model: CausalLM) -> tuple[Any, ...]:
    """What a recorded step depends on beside its own memory: the modules, where their tensors are, the settings."""
    addresses = tuple((t.data_ptr(), t.dtype) for t in _tensors(model))
    return tuple(model.modules()), addresses, dict(vars(model.config))


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    modules = len(a[0]) == len(b[0]) and all(x is y for x, y in zip(a[0], b[0], strict=True))
    return modules and a[1:] == b[1:]
