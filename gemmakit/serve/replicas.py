"""The server's application as a deployment of Ray Serve: replicas with a model each, behind one address."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastapi import FastAPI

from gemmakit.errors import InputError
from gemmakit.serve.app import create_app
from gemmakit.serve.ray_pool import connect, import_ray, needs_of_one
from gemmakit.serve.server import LAST_WORDS_S, log, set_up
from gemmakit.serve.service import Loading, Service
from gemmakit.serve.settings import ServeSettings

NAME = "gemmakit"
LOOK_S = 0.1
# Requests that a replica takes beside those its engine has room for, so that it is the engine that says 429.
BESIDE = 64
STORE_BYTES = 100_000_000  # requests and answers are small
_OWN = {  # of a cluster that lasts as long as this process: its workers as urgent as it is, and nothing told to others
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run(
    settings: ServeSettings, address: tuple[str, int], loading: Loading, count: int, ready: Callable[[], None]
) -> int:
    """Serve by `count` replicas until told to end; the exit code. ready: called once all of them answer.

    They run on the cluster that RAY_ADDRESS names or that this machine is of, else on one that lasts as long as this
    call. Ray starts another where a replica dies. The first signal lets running answers end, for drain_s at most, the
    second one does not. To be called in the main thread.

    Raises MissingDependency; InputError where there is no room, Ray Serve is in use, or the model cannot be loaded.
    """
    ray, serve = import_ray("--replicas"), import_ray("--replicas", "ray.serve")
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with _cluster(ray, count) as ours, _Signals() as signals:
        if (found := serve.status()).applications or found.proxies:
            said = ", ".join(found.applications) or "no application"
            raise InputError(f"Ray Serve runs on this cluster already ({said}): end it with serve shutdown.")
        application = _application(serve, settings, loading, needs_of_one(ray, count), count, quiet)
        try:
            serve.start(http_options={"host": address[0], "port": address[1]}, logging_config=quiet)
            _deploy(serve, application)
            signals.interrupt = False
            ready()
            while not signals.count:
                time.sleep(LOOK_S)
            serve.delete(NAME, _blocking=False)
            while signals.count < 2 and NAME in serve.status().applications:
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            pass
        finally:
            if not ours and signals.count < 2:
                serve.shutdown()
    return 0


def _application(
    serve: Any, settings: ServeSettings, loading: Loading, needs: dict[str, Any], count: int, quiet: dict[str, Any]
) -> Any:
    def build() -> FastAPI:
        return _loaded(settings, loading)

    room = loading.engine["max_batch_size"] + loading.engine["max_waiting"] + BESIDE
    deployment = serve.deployment(
        serve.ingress(build)(),
        name=NAME,
        num_replicas=count,
        ray_actor_options=needs,
        max_ongoing_requests=room,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=LOOK_S,
        logging_config=quiet,
    )
    return deployment.bind()


def _loaded(settings: ServeSettings, loading: Loading) -> FastAPI:
    """The application in a replica's process, with its model."""
    set_up(settings)
    service = Service(settings)
    service.load(loading)
    worker = service.worker
    assert worker is not None

    def end() -> None:  # Ray starts another one; whoever waits is told first
        log.error("the engine failed", exc_info=worker.error)
        threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()

    worker.on_death = end
    return create_app(service)


def _deploy(serve: Any, application: Any) -> None:
    """Back once all replicas answer. Raises InputError where they cannot."""
    try:
        serve.run(application, name=NAME)
    except RuntimeError as error:  # its last lines are those of what the replica raised
        said = [line for line in str(error).splitlines() if ": " in line] or [str(error)]
        raise InputError(f"a replica could not load the model: {said[-1].strip()}") from error


@contextmanager
def _cluster(ray: Any, count: int) -> Generator[bool, None, None]:
    """Connected to the cluster that is there, else to one of this process; whether it is that."""
    ours = False
    try:
        connect(ray, log_to_driver=True)
    except ConnectionError:
        if os.environ.get("RAY_ADDRESS"):
            raise InputError(f"there is no Ray cluster at {os.environ['RAY_ADDRESS']} (RAY_ADDRESS).") from None
        ours = True
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
