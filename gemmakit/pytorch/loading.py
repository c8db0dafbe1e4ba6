"""A checkpoint's tensors on the device that the model goes to, the next ones on their way while one is used.

On the CPU they stay in the mapped file. To an accelerator they go through pinned buffers: several threads copy from the
file's pages into buffers of their own, two each, so that one is filled while the other is on the bus.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gemmakit.checkpoint import Checkpoint
from gemmakit.checkpoint.readahead import fault_in

BUFFER_BYTES = 32 << 20
READERS = 6
# What may be on the device before it is asked for.
AHEAD_BYTES = 512 << 20


class Bus(Protocol):
    """One thread's way to a device: buffers in host memory, and copies that run beside everything else."""

    def buffer(self, nbytes: int) -> Tensor:
        """Host memory, uint8 (nbytes,), that the device can read by itself."""
        ...

    def begin(self, moment: Any) -> None:
        """What follows waits on the device for `moment`."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Start a copy from a buffer; gives a moment, at which it is over."""
        ...

    def wait(self, moment: Any) -> None:
        """Hold this thread until then: the buffer may be filled again."""
        ...


class Device(Protocol):
    """Where tensors go. `bus` is called in each reader thread, the others in the thread that loads."""

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor: ...

    def now(self) -> Any:
        """The moment at which all work started so far is over."""
        ...

    def join(self, moment: Any) -> None:
        """What is started from now on waits, on the device, for `moment`."""
        ...

    def bus(self) -> Bus: ...


class CudaBus:
    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def begin(self, moment: torch.cuda.Event) -> None:
        self.stream.wait_event(moment)

    def copy(self, target: Tensor, source: Tensor) -> Any:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()


class CudaDevice:
    def __init__(self, device: torch.device):
        # The current device is the calling thread's; readers would take the first.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def now(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def join(self, moment: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(moment)

    def bus(self) -> CudaBus:
        return CudaBus(self.device)


class _Arrival:
    """A tensor on its way: its pieces are copied by whichever reader is free."""

    def __init__(self, source: Tensor, result: Tensor, free: Any):
        self.source, self.target, self.result, self.free = _flat(source), _flat(result), result, free
        self.moments: list[Any] = []
        self.left = 0
        self.error: BaseException | None = None
        self.over = threading.Event()


class Copier:
    """Copies CPU tensors to a device, several at a time. A context manager; its threads end with it."""

    def __init__(self, device: Device, readers: int | None = None, buffer_bytes: int = BUFFER_BYTES):
        self.device, self.buffer_bytes = device, buffer_bytes
        self._jobs: queue.SimpleQueue[tuple[_Arrival, slice] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        count = readers or min(READERS, os.cpu_count() or 1)
        names = (f"gemmakit reader {i}" for i in range(count))
        self._threads = [threading.Thread(target=self._read, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def send(self, tensor: Tensor) -> _Arrival:
        """Start copying a contiguous CPU tensor."""
        # The target's memory may have been another's, whose work must be over before anything is written.
        arrival = _Arrival(tensor, self.device.empty(tensor.shape, tensor.dtype), self.device.now())
        pieces = [slice(at, at + self.buffer_bytes) for at in range(0, len(arrival.source), self.buffer_bytes)]
        arrival.left = len(pieces)
        if not pieces:
            arrival.over.set()
        for piece in pieces:
            self._jobs.put((arrival, piece))
        return arrival

    def receive(self, arrival: _Arrival) -> Tensor:
        """The tensor on the device; what is started on it afterwards waits for its bytes. Raises what a reader did."""
        arrival.over.wait()
        if arrival.error is not None:
            raise arrival.error
        for moment in arrival.moments:
            self.device.join(moment)
        return arrival.result

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        while not self._jobs.empty():  # what nobody waits for any more
            with suppress(queue.Empty):
                self._jobs.get_nowait()
        for _thread in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        bus: Bus | None = None
        buffers: deque[tuple[Tensor, Any]] = deque()
        while (job := self._jobs.get()) is not None:
            arrival, piece = job
            try:
                if bus is None:
                    bus = self.device.bus()
                    buffers.extend((bus.buffer(self.buffer_bytes), None) for _ in range(2))
                buffer, last = buffers.popleft()
                moment = last
                try:
                    if last is not None:
                        bus.wait(last)
                    moment = _copied(bus, arrival, piece, buffer)
                finally:
                    buffers.append((buffer, moment))
                self._landed(arrival, moment, None)
            except BaseException as e:
                self._landed(arrival, None, e)
        for _, last in buffers:
            if bus is not None and last is not None:
                bus.wait(last)  # memory that is being read is not given back

    def _landed(self, arrival: _Arrival, moment: Any, error: BaseException | None) -> None:
        with self._lock:
            if error is None:
                arrival.moments.append(moment)
            else:
                arrival.error = error
            arrival.left -= 1
            if not arrival.left:
                arrival.over.set()


def _copied(bus: Bus, arrival: _Arrival, piece: slice, buffer: Tensor) -> Any:
    source = arrival.source[piece]
    held = buffer[: len(source)]
    # Reads the file's pages without Python's lock, on this thread alone: torch would share each copy among all cores.
    ctypes.memmove(held.data_ptr(), source.data_ptr(), len(source))
    bus.begin(arrival.free)
    return bus.copy(arrival.target[piece], held)


def _flat(tensor: Tensor) -> Tensor:
    """Its bytes, uint8 (n,)."""
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


class Weights:
    """The tensors of a checkpoint by name, to be taken once each and in the order of `names`.

    device: None leaves them mapped on the CPU. A context manager.
    """

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str], device: Device | None):
        self._checkpoint = checkpoint
        order = list(names)
        self._announced, self._names = set(order), iter(order)
        self._copier = None if device is None else Copier(device)
        self._sent: deque[tuple[str, _Arrival]] = deque()
        self._ahead = 0
        self._addresses: set[int] = set()

    def take(self, name: str) -> Tensor:
        """The tensor as it is stored, on the device if it is among the names that were announced."""
        if self._copier is None:
            tensor = self._checkpoint.tensor(name, device="cpu")
            self._addresses.add(tensor.data_ptr())
            return tensor
        if name not in self._announced:
            return self._checkpoint.tensor(name, device="cpu")
        while True:
            self._send_ahead(self._copier)
            found, arrival = self._sent.popleft()
            self._ahead -= len(arrival.source)
            tensor = self._copier.receive(arrival)
            if found == name:  # otherwise nobody wanted it
                self._send_ahead(self._copier)
                return tensor

    def _send_ahead(self, copier: Copier) -> None:
        """Keep the readers busy; one tensor at least is on its way, however large."""
        while self._ahead < AHEAD_BYTES or not self._sent:
            name = next(self._names, None)
            if name is None:
                return
            arrival = copier.send(self._checkpoint.tensor(name, device="cpu"))
            self._ahead += len(arrival.source)
            self._sent.append((name, arrival))

    def settle(self, model: nn.Module) -> None:
        """What the model keeps in the mapped file is brought in from now on, beside whatever comes next."""
        kept = [t for t in _tensors(model) if t.device.type == "cpu" and t.data_ptr() in self._addresses]
        pieces = dict.fromkeys((t.data_ptr(), t.nbytes) for t in kept if t.nbytes)
        if pieces:
            fault_in(list(pieces), kept)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        if self._copier is not None:
            self._copier.__exit__()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def weights(checkpoint: Checkpoint, names: Iterable[str], device: torch.device) -> Weights:
    """The tensors of a checkpoint on `device`."""
    return Weights(checkpoint, names, CudaDevice(device) if device.type == "cuda" else None)
