"""Steps that a device runs again without being told each kernel anew, and what is kept of them from call to call.

A step that reads and writes fixed memory only is recorded once and replayed afterwards: the host then starts one thing
a token instead of hundreds. The functions here know nothing of what a step does.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Step = Callable[[], None]
_log = logging.getLogger("gemmakit")
# As many shapes as a chat, a batch job and an evaluation need side by side.
KEPT = 8


class Recorder(Protocol):
    """Turns a step into one that costs the host little."""

    budget_bytes: int  # what may be kept between calls

    def record(self, step: Step) -> Step:
        """A function that does what `step` does, on the same memory. The step runs a few times meanwhile."""
        ...

    def drain(self) -> None:
        """Wait until nothing that was recorded is running any more."""
        ...


class Uncaptured:
    """Runs the step as it is: for tests, where there is no device that could record it."""

    budget_bytes = 1 << 30

    def __init__(self, device: torch.device):
        pass

    def record(self, step: Step) -> Step:
        return step

    def drain(self) -> None:
        pass


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

    def record(self, step: Step) -> Step:
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


def _capture(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream, step: Step) -> None:
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


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaGraphs}


class Recorded(Protocol):
    """What is kept: a recorded step and the memory it works on."""

    @property
    def nbytes(self) -> int: ...


class Kept:
    """The recorded steps of one model, the latest used last. Whoever uses one holds the lock.

    refusal: why recording failed once; it is not tried again then. Copies and pickles of a model begin without any.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entries: OrderedDict[Hashable, Recorded] = OrderedDict()
        self.refusal: str | None = None
        self._recorder: Recorder | None = None
        self._identity: tuple[Any, ...] | None = None

    def open(self, model: nn.Module, device: torch.device) -> Recorder:
        """The recorder; forgets everything if the model is not what it was when the steps were recorded."""
        now = _identity(model)
        if self._identity is None or not _same(now, self._identity):
            self.clear()
            self._identity = now
        if self._recorder is None:
            self._recorder = RECORDERS[device.type](device)
        return self._recorder

    def use(self, key: Hashable) -> Recorded | None:
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def trim(self) -> None:
        """Let go of the longest unused beyond what may be kept."""
        budget = 0 if self._recorder is None else self._recorder.budget_bytes
        while self.entries and (len(self.entries) > KEPT or self.nbytes > budget):
            self._drain()
            self.entries.popitem(last=False)

    def clear(self) -> None:
        if self.entries:
            self._drain()
        self.entries.clear()
        self._recorder = self._identity = None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def _drain(self) -> None:
        if self._recorder is not None:
            self._recorder.drain()

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


def kept(model: nn.Module) -> Kept:
    """What is kept of a model's recorded steps."""
    found = model.__dict__.get("_recorded")
    if found is None:
        found = model.__dict__["_recorded"] = Kept()
    return found


def why_not(model: Any) -> str | None:
    """Why no step of this model can be recorded, in words; None if it can."""
    device = model.device
    if device.type not in RECORDERS:
        return f"{device.type} has no graphs"
    if any(t.device != device for t in _tensors(model)):
        return "its weights are on several devices or offloaded"
    if kept(model).refusal is not None:
        return kept(model).refusal
    if model.training:
        return "it is in training mode"
    if model.config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return f"rope type {model.config.rope_parameters['rope_type']} reads the length on the host"
    if model.config.attn_implementation == "flex_attention":
        return "flex_attention makes its blocks anew each step"
    return next((reason for module in model.modules() if (reason := _foreign(module))), None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _foreign(module: nn.Module) -> str | None:
    """Why a replay might leave out something that this module does."""
    kind = type(module)
    if kind.__module__.split(".")[0] not in ("gemmakit", "torch"):
        return f"{kind.__module__}.{kind.__name__} is another library's"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return f"a {kind.__name__} has hooks"
    if "forward" in module.__dict__:
        return f"the forward of a {kind.__name__} was replaced"
    return None


def say(model: Any, reason: str) -> None:
    """Log, once a model and reason, that steps run one by one."""
    said: set[str] = model.__dict__.setdefault("_said", set())
    if reason not in said:
        said.add(reason)
        _log.debug("decoding runs step by step: %s", reason)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _identity(model: Any) -> tuple[Any, ...]:
    """What a recorded step depends on beside its own memory: the modules, where their tensors are, the settings."""
    addresses = tuple((t.data_ptr(), t.dtype) for t in _tensors(model))
    return tuple(model.modules()), addresses, dict(vars(model.config))


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    modules = len(a[0]) == len(b[0]) and all(x is y for x, y in zip(a[0], b[0], strict=True))
    return modules and a[1:] == b[1:]
