"""How a step is captured, on a stand-in for torch.cuda that does what torch does, its faults included."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from gemmakit.pytorch.decode import capture

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, cuda):
        self.cuda = cuda

    def wait_stream(self, other):
        self.cuda.done.append(("wait", self, other))


class Chance:
    """A generator whose state is a number; one that a capture did not end for draws no more."""

    def __init__(self, *_):
        self.state, self.capturing = 0, False

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state

    def graphsafe_get_state(self):
        return self

    def graphsafe_set_state(self, other):
        self.state, self.capturing = other.state, other.capturing

    def draw(self):
        assert not self.capturing, "Offset increment outside graph capture encountered unexpectedly."
        self.state += 1


class Graph:
    def pool(self):
        return id(self)

    def replay(self):
        pass


class Cuda:
    """torch.cuda as far as recording uses it. broken: ending the capture raises, and so ends nothing."""

    def __init__(self):
        self.done, self.broken, self.captured = [], False, []
        self.now = self.main = Stream(self)
        self.default_generators = (Chance(),)
        self.CUDAGraph = Graph

    def Stream(self, device):
        return Stream(self)

    def current_stream(self, device=None):
        return self.now

    def current_device(self):
        return 0

    def set_stream(self, stream):
        self.now = stream

    def mem_get_info(self, device):
        return 0, 1 << 30

    def synchronize(self, device=None):
        self.done.append("synchronized")

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        """As torch has it: neither the stream nor the generator comes back where ending the capture raises."""
        before, self.now = self.now, stream
        self.default_generators[0].capturing = True
        self.captured.append(SimpleNamespace(pool=pool, stream=stream, mode=capture_error_mode))
        try:
            yield
        finally:
            if self.broken:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.now = before
            self.default_generators[0].capturing = False


@pytest.fixture
def cuda(monkeypatch):
    found = Cuda()
    monkeypatch.setattr(capture.torch, "cuda", found)
    monkeypatch.setattr(capture.torch, "Generator", Chance)
    return found


def test_a_step_runs_twice_on_the_stream_on_which_it_is_captured(cuda):
    streams = []
    recorder = capture.CudaGraphs(DEVICE)
    recorder.capture(lambda: streams.append(cuda.now))
    side = cuda.captured[0].stream
    assert streams == [side] * 3 and side is not cuda.main
    # What the step reads was made on the main stream, and what the first runs took goes back to it.
    assert cuda.done == [("wait", side, cuda.main), ("wait", cuda.main, side)]
    assert cuda.now is cuda.main
    assert cuda.captured[0].mode == "thread_local"


def test_steps_share_the_memory_of_graphs_that_are_alive_and_one_stream(cuda):
    recorder = capture.CudaGraphs(DEVICE)
    first = recorder.capture(lambda: None)
    second = recorder.capture(lambda: None)
    pool = first.__self__.pool()
    del first, second
    gc.collect()
    third = recorder.capture(lambda: None)
    assert [c.pool for c in cuda.captured] == [None, pool, None]
    assert len({id(c.stream) for c in cuda.captured}) == 1
    assert third.__self__.pool()


class Waits(Exception):
    pass


@pytest.mark.parametrize("broken", [True, False])
def test_a_capture_that_fails_leaves_stream_and_chance_as_they_were(broken, cuda):
    chance, runs = cuda.default_generators[0], []
    chance.draw()

    def step():
        runs.append(1)
        if len(runs) == 3:
            cuda.broken = broken
            raise Waits("operation not permitted when stream is capturing")

    with pytest.raises(Waits, match="not permitted"):  # not what ending the capture says
        capture.CudaGraphs(DEVICE).capture(step)
    assert cuda.now is cuda.main
    chance.draw()
    assert chance.state == 2


def test_a_capture_that_cannot_end_is_told_as_it_is(cuda):
    cuda.broken = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        capture.CudaGraphs(DEVICE).capture(lambda: None)
    assert cuda.now is cuda.main
    cuda.default_generators[0].draw()


def test_the_reason_is_one_line_that_names_the_kind():
    assert capture.reason_of(Waits("one\ntwo")) == "recording a step failed (Waits: one)"
    assert capture.reason_of(Waits()) == "recording a step failed (Waits)"
