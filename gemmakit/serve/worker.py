"""The thread that owns the engine: requests come in by a queue, events go out to the event loop of whoever asked."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol, TypeVar

from gemmakit.pytorch.decode.batch import BatchEngine, Event, Request
from gemmakit.pytorch.parallel.lockstep import LeadingEngine
from gemmakit.serve.refusals import Refusal

T = TypeVar("T")


class Observer(Protocol):
    """Is told of requests, in the engine's thread: it must neither wait nor raise."""

    def begun(self, job: Job) -> None:
        """The engine has taken a request."""
        ...

    def ended(self, job: Job, event: Event) -> None:
        """An answer has ended; `event` has the reason and the usage."""
        ...


class Outbox:
    """What the engine says to one caller, in the event loop in which this was made.

    limit: events that may wait. A caller that reads more slowly is `dropped`.
    """

    def __init__(self, limit: int):
        self.loop, self.limit = asyncio.get_running_loop(), limit
        self.events: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()
        self.dropped = asyncio.Event()

    def put(self, job: Job, event: Event) -> None:
        if self.events.qsize() >= self.limit:
            self.dropped.set()
        else:
            self.events.put_nowait((job, event))


class Job:
    """A request under way, and whom to tell. place: which of its caller's prompts it is."""

    def __init__(self, request: Request, outbox: Outbox, place: int = 0):
        self.request, self.outbox, self.place = request, outbox, place
        self.id: int | None = None
        self.open = request.n  # answers that have not ended
        self.cancelled = False


class Worker:
    """Owns a BatchEngine in a thread of its own.

    engine: None for a model that does not generate; the thread then runs calls only.
    """

    def __init__(self, engine: BatchEngine | None, observers: Iterable[Observer] = ()):
        self.engine = engine
        self.observers = list(observers)
        self.error: BaseException | None = None  # what ended the thread before its time
        self.on_death: Callable[[], None] = lambda: None  # called in the engine's thread
        self._inbox: queue.SimpleQueue[Callable[[], bool | None]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._thread = threading.Thread(target=self._run, name="gemmakit-engine", daemon=True)
        self._thread.start()

    # -- from any thread -------------------------------------------------------------------------------------------

    async def submit(self, job: Job) -> None:
        """Give a request to the engine; back once it is taken. Raises what `BatchEngine.add` raises, and Refusal."""
        try:
            await asyncio.wrap_future(self.call(lambda: self._add(job)))
        except asyncio.CancelledError:
            self.cancel(job)
            raise

    def cancel(self, job: Job) -> None:
        """End a request before the next step; nothing more is told of it."""
        job.cancelled = True
        self._inbox.put(lambda: self._cancel(job))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self.error is not None:
                    raise _dead()
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(run)
        if self.error is not None:  # nobody reads the inbox any more
            self._refuse_inbox()
        return future

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return bool(self._jobs) or not self._inbox.empty()

    @property
    def under_way(self) -> int:
        """Requests that the engine has."""
        return len(self._jobs)

    def close(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step that runs."""
        self._inbox.put(lambda: True)
        self._thread.join(timeout_s)
        if isinstance(self.engine, LeadingEngine) and self.error is None and not self._thread.is_alive():
            self.engine.close()

    # -- in the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take():
                assert self.engine is not None
                self._tell(self._step(self.engine))
        except BaseException as error:
            self._die(error)

    def _take(self) -> bool:
        """Do what came in, waiting where there is nothing else to do; whether to go on."""
        while not (self.engine is not None and self.engine.has_work) or not self._inbox.empty():
            if self._inbox.get()():
                return False
        return True

    def _step(self, engine: BatchEngine) -> list[Event]:
        """An engine that raised is stepped once more: what it held is as it was, and memory may be there by then."""
        try:
            return engine.step()
        except Exception:
            return engine.step()

    def _add(self, job: Job) -> None:
        if job.cancelled:
            return
        if self.engine is None:
            raise Refusal(400, "this model gives embeddings, not texts: use /v1/embeddings.")
        job.id = self.engine.add(job.request)
        self._jobs[job.id] = job
        for observer in self.observers:
            observer.begun(job)

    def _cancel(self, job: Job) -> None:
        if job.id is not None and self._jobs.pop(job.id, None) is not None and self.engine is not None:
            self.engine.cancel(job.id)
            for observer in self.observers:
                observer.ended(job, Event(job.id, None, "cancelled"))

    def _tell(self, events: Iterable[Event]) -> None:
        """Hand events out, one call a loop and step."""
        said: dict[asyncio.AbstractEventLoop, list[tuple[Job, Event]]] = {}
        for event in events:
            job = self._jobs.get(event.id)
            if job is None:  # cancelled
                continue
            said.setdefault(job.outbox.loop, []).append((job, event))
            if event.finish_reason is not None:
                job.open -= 1
                if not job.open:
                    del self._jobs[event.id]
                for observer in self.observers:
                    observer.ended(job, event)
        for loop, pairs in said.items():
            if not _deliver(loop, pairs):
                for job, _ in pairs:
                    self._cancel(job)

    def _die(self, error: BaseException) -> None:
        self.error = error
        # An error for each answer that has not ended; which of them it is, nobody asks any more.
        self._tell([Event(id, None, "error", _dead()) for id, job in self._jobs.items() for _ in range(job.open)])
        self._refuse_inbox()
        self.on_death()

    def _refuse_inbox(self) -> None:
        """Callers that wait are told that nobody will come."""
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()


def _deliver(loop: asyncio.AbstractEventLoop, pairs: Iterable[tuple[Job, Event]]) -> bool:
    """Whether there is still anybody to tell: a loop that is closed takes nothing."""

    def put() -> None:
        for job, event in pairs:
            job.outbox.put(job, event)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        return False
    return True


def _dead() -> Refusal:
    return Refusal(503, "the engine has failed, and the server ends; its log says why.", code="engine_dead")
