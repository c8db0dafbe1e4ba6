"""The process: a socket, uvicorn, the model loaded beside it, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gemmakit.errors import InputError
from gemmakit.serve.access_log import write_to_stderr
from gemmakit.serve.app import create_app
from gemmakit.serve.patience import PatientProtocol
from gemmakit.serve.service import Loading, Service
from gemmakit.serve.settings import ServeSettings
from gemmakit.serve.tracing import export_to

log = logging.getLogger("gemmakit.serve")
# How often a draining server looks whether the last answer has ended; and how long callers of a failed engine have to
# be told before the process ends.
LOOK_S, LAST_WORDS_S = 0.05, 1.0
GOODBYE_S = 2  # for connections that take what is said already, once the last answer has ended
MAX_HEADER_BYTES = 64 * 2**10
# How long the engine's thread may keep the interpreter while the event loop has something to send. Python's own 5 ms is
# several steps of a small model: a first token waited for that long.
SWITCH_S = 0.0005


def listen(host: str, port: int, stall_s: float) -> socket.socket:
    """A listening socket. A reader that takes nothing for `stall_s` is cut off by the system, where it can.

    Raises InputError where the address is taken or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}. "
            "Choose another --port (0: any free one) or --host."
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))
    return made


class Server(uvicorn.Server):
    """Serves an application until it is told to end.

    The first signal drains: no new work, running answers end, at the latest after the settings' drain_s. The second
    ends at once. `load` fills the service in a thread of its own; what it raises ends the server.
    """

    def __init__(self, app: FastAPI, service: Service, load: Callable[[], None]):
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=GOODBYE_S,
            proxy_headers=False,  # nothing here reads who a proxy says it asks for
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            http=PatientProtocol,
            ws="none",
        )
        super().__init__(settings)
        # What it would say of a failing route is in our own log, and of an end in haste nobody wants to know.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        self.service, self._load = service, load
        self.failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._loading, name="gemmakit-loader", daemon=True).start()

    def _loading(self) -> None:
        try:
            self._load()
            worker = self.service.worker
            assert worker is not None
            worker.on_death = lambda: self._fail(worker.error)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException | None) -> None:
        """From any thread: end, once callers are told."""
        self.failure = error
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._loop.call_later, LAST_WORDS_S, self._stop)

    def _stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self.service.draining:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._ending = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.service.settings.drain_s
        worker = self.service.worker
        while worker is not None and worker.busy and loop.time() < until:
            await asyncio.sleep(LOOK_S)
        self.should_exit = True


def set_up(settings: ServeSettings) -> Callable[[], None] | None:
    """Make a process one that serves; what is to be called before it ends, if anything is."""
    write_to_stderr()
    sys.setswitchinterval(SWITCH_S)
    return export_to(settings.otlp_endpoint) if settings.otlp_endpoint else None


def run(settings: ServeSettings, listening: socket.socket, loading: Loading, ready: Callable[[], None]) -> int:
    """Serve until told to end; the exit code. Raises what loading raises. ready: called once requests are answered."""
    flush = set_up(settings)
    service = Service(settings)

    def load() -> None:
        service.load(loading)
        ready()

    server = Server(create_app(service), service, load)
    server.run([listening])
    if service.worker is not None:
        service.worker.close(LAST_WORDS_S)
    if flush is not None:
        flush()
    if server.failure is None:
        return 0
    if service.worker is None:  # it never opened
        raise server.failure
    log.error("the engine failed", exc_info=server.failure)
    return 1
