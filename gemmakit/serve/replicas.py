"""The server's application as a deployment of Ray Serve: replicas with a model each, behind one address."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from fastapi import FastAPI

from gemmakit.errors import InputError
from gemmakit.serve.app import create_app
from gemmakit.serve.ray_pool import LOOK_S, connect, import_ray, needs_of_one, tell_what_lacks
from gemmakit.serve.server import GOODBYE_S, LAST_WORDS_S, log, set_up
from gemmakit.serve.service import Loading, Service
from gemmakit.serve.settings import ServeSettings

NAME = "gemmakit"
OWN = "local"  # in RAY_ADDRESS, as ray.init() has it: a cluster of this process, whatever else runs here
# Requests that a replica takes beside those its engine has room for, so that it is the engine that says 429.
BESIDE = 64
STORE_BYTES = 100_000_000  # requests and answers are small
_OWN = {  # of a cluster that lasts as long as this process: its workers as urgent as it is, and nothing told to others
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Ending:
    """An actor: whether the server is to end, and how many replicas have nothing more to say since it is."""

    def __init__(self):
        self._told, self._done = asyncio.Event(), 0

    async def tell(self) -> None:
        self._told.set()

    async def told(self) -> None:
        """Back once it is to end."""
        await self._told.wait()

    async def done(self) -> None:
        """Of a replica, once."""
        self._done += 1

    async def count_done(self) -> int:
        return self._done


def run(
    settings: ServeSettings,
    address: tuple[str, int],
    loading: Loading,
    count: int,
    ready: Callable[[], None],
    tell: Callable[[str], None],
) -> int:
    """Serve by `count` replicas until told to end; the exit code. ready: called once all of them answer.

    They run on the cluster that RAY_ADDRESS names or that this machine is of, else on one that lasts as long as this
    call. Ray starts another where a replica dies. The first signal lets running answers end, for drain_s at most, while
    all else gets 503; the second one does not. tell: takes a line about what it waits for. To be called in the main
    thread.

    Raises MissingDependency; InputError where there is no room, Ray Serve is in use, or the model cannot be loaded.
    """
    ray, serve = import_ray("--replicas"), import_ray("--replicas", "ray.serve")
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with _cluster(ray, count) as ours, _Signals() as signals:
        if (found := serve.status()).applications or found.proxies:
            said = ", ".join(found.applications) or "no application"
            raise InputError(f"Ray Serve runs on this cluster already ({said}): end it with serve shutdown.")
        needs = needs_of_one(ray, count)
        ending = ray.remote(num_cpus=0)(Ending).remote()
        application = _application(serve, settings, loading, needs, count, quiet, ending)
        try:
            tell_what_lacks(ray, needs, count, tell)
            serve.start(http_options={"host": address[0], "port": address[1]}, logging_config=quiet)
            _deploy(serve, application)
            signals.interrupt = False
            ready()
            while not signals.count:
                time.sleep(LOOK_S)
            _drain(ray, ending, count, settings.drain_s, signals)
            if ours and signals.count < 2:
                time.sleep(LAST_WORDS_S)  # then all of it ends at once: nobody meets Ray's 404 for what is taken out
            elif not ours:
                serve.delete(NAME, _blocking=False)
                while signals.count < 2 and NAME in serve.status().applications:
                    time.sleep(LOOK_S)
        except KeyboardInterrupt:
            pass
        finally:
            if not ours and signals.count < 2:
                serve.shutdown()
    return 0


def _drain(ray: Any, ending: Any, count: int, drain_s: float, signals: _Signals) -> None:
    """Back once the last answer has ended, or drain_s are over, or another signal came."""
    until = time.monotonic() + drain_s
    with suppress(ray.exceptions.RayActorError):  # the node of `ending` is gone: nobody can be told
        ray.get(ending.tell.remote())
        while signals.count < 2 and time.monotonic() < until and ray.get(ending.count_done.remote()) < count:
            time.sleep(LOOK_S)


def _application(
    serve: Any,
    settings: ServeSettings,
    loading: Loading,
    needs: dict[str, Any],
    count: int,
    quiet: dict[str, Any],
    ending: Any,
) -> Any:
    def build() -> FastAPI:
        service = _loaded(settings, loading)
        threading.Thread(target=_follow, args=(ending, service), daemon=True).start()
        return create_app(service)

    room = loading.engine["max_batch_size"] + loading.engine["max_waiting"] + BESIDE
    deployment = serve.deployment(
        serve.ingress(build)(),
        name=NAME,
        num_replicas=count,
        ray_actor_options=needs,
        max_ongoing_requests=room,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=GOODBYE_S,
        graceful_shutdown_wait_loop_s=LOOK_S,
        logging_config=quiet,
    )
    return deployment.bind()


def _loaded(settings: ServeSettings, loading: Loading) -> Service:
    """What a replica's process serves, with its model."""
    set_up(settings)
    service = Service(settings)
    service.load(loading)
    worker = service.worker
    assert worker is not None

    def end() -> None:  # Ray starts another one; whoever waits is told first
        log.error("the engine failed", exc_info=worker.error)
        threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()

    worker.on_death = end
    return service


def _follow(ending: Any, service: Service) -> None:
    """In a replica: take no new work once the server is to end, and say when the last answer has ended."""
    ray = import_ray("--replicas")
    with suppress(ray.exceptions.RayError):  # who started the server is gone, and with it whoever would be told
        ray.get(ending.told.remote())
        service.draining = True
        while service.worker is not None and service.worker.busy:
            time.sleep(LOOK_S)
        ray.get(ending.done.remote())


def _deploy(serve: Any, application: Any) -> None:
    """Back once all replicas answer. Raises InputError where they cannot."""
    try:
        serve.run(application, name=NAME)
    except RuntimeError as error:  # its last lines are those of what the replica raised
        said = [line for line in str(error).splitlines() if ": " in line] or [str(error)]
        raise InputError(f"a replica could not load the model: {said[-1].strip()}") from error


@contextmanager
def _cluster(ray: Any, count: int) -> Generator[bool, None, None]:
    """Connected to the cluster that is there, else, or where RAY_ADDRESS is "local", to one of this process; which."""
    named = os.environ.get("RAY_ADDRESS")
    ours = named == OWN
    try:
        if not ours:
            connect(ray, log_to_driver=True)
    except ConnectionError:
        if named:
            raise InputError(f"there is no Ray cluster at {named} (RAY_ADDRESS).") from None
        ours = True
    if ours:
        for name, value in _OWN.items():
            os.environ.setdefault(name, value)
        sizes = {"num_cpus": max(count, os.cpu_count() or 1), "object_store_memory": STORE_BYTES}
        ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, **sizes)
    try:
        yield ours
    finally:
        ray.shutdown()


class _Signals:
    """SIGINT and SIGTERM, counted while the context lasts. interrupt: whether one raises KeyboardInterrupt."""

    def __init__(self):
        self.count, self.interrupt = 0, True

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.interrupt:
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
