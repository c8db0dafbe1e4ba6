"""Rows of a batch answered on a Ray cluster: actors with a model each. What is done is known by the files alone, so a
node that dies costs its rows no more than being asked again.
"""

from __future__ import annotations

import asyncio
import heapq
import importlib
import logging
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gemmakit.errors import InputError, MissingDependency
from gemmakit.serve.app import ask, bare_app
from gemmakit.serve.service import Loading, Service
from gemmakit.serve.settings import ServeSettings

# After a call that met a dead actor: how long others are asked first, and how long a row waits to be asked again.
AVOID_S, WAIT_S = 5.0, 0.2
# With no answer from anywhere for so long, the batch stops.
PATIENCE_S = 600.0
# For how long a cluster may take what has just ended for running still; and between two looks.
SETTLE_S, LOOK_S = 2.0, 0.1


class Answerer:
    """An actor: a model, and the application that answers as the server would."""

    def __init__(self, loading: Loading):
        service = Service(ServeSettings(queue_s=None))
        service.load(loading)
        self._draws, self._app = service.ready().draws, bare_app(service)

    async def draws(self) -> bool:
        """Whether the model draws its tokens where a row says nothing."""
        return self._draws

    async def answer(self, url: str, body: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
        """Status and body."""
        return await ask(self._app, url, body)


class Pool:
    """Actors of which each row asks the one that has least to do. draws: as of `Answerer`. deaths: calls lost.

    lost: what a call raises whose actor died.
    """

    def __init__(self, actors: Sequence[Any], draws: bool, lost: type[Exception]):
        self.actors, self.draws, self.deaths, self._lost = actors, draws, 0, lost
        self._busy = [0] * len(actors)
        self._avoided = [0.0] * len(actors)  # until when
        self._order = [(0, i) for i in range(len(actors))]  # a heap; entries that no longer hold are skipped
        self._answered: float | None = None

    async def answer(self, url: str, body: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
        """Asked again where an actor dies, until one answers. Status 503 where none has for `PATIENCE_S`."""
        clock = asyncio.get_running_loop().time
        self._answered = clock() if self._answered is None else self._answered
        while True:
            i = self._least_busy(clock())
            self._change(i, 1)
            try:
                found = await self.actors[i].answer.remote(url, dict(body))
                self._answered = clock()
                return found
            except self._lost:
                self.deaths += 1
                self._avoided[i] = clock() + AVOID_S
            finally:
                self._change(i, -1)
            if clock() - self._answered > PATIENCE_S:
                return 503, {"error": {"message": f"no actor of the cluster has answered for {PATIENCE_S:.0f} s"}}
            await asyncio.sleep(WAIT_S)

    def _least_busy(self, now: float) -> int:
        if len(self._order) > 8 * len(self.actors):
            self._order = sorted((busy, i) for i, busy in enumerate(self._busy))
        while self._order:
            busy, i = heapq.heappop(self._order)
            if busy == self._busy[i] and self._avoided[i] <= now:
                return i
        return min(range(len(self.actors)), key=lambda i: (self._avoided[i] > now, self._busy[i]))

    def _change(self, i: int, by: int) -> None:
        self._busy[i] += by
        heapq.heappush(self._order, (self._busy[i], i))


@contextmanager
def pool(loading: Loading, actors: int | None, rows: int, tell: Callable[[str], None]) -> Generator[Pool, None, None]:
    """Actors on the cluster that RAY_ADDRESS names, or that runs on this machine, while the context lasts.

    actors: how many; by default one a GPU, or a node where there are none. rows: that each answers side by side. The
    cluster starts an actor elsewhere, when it has room, where a node dies. tell: takes a line about what it waits for.
    Raises MissingDependency, and InputError where there is no cluster, no room, or the model cannot be loaded.
    """
    ray = import_ray("--ray")
    try:
        connect(ray, log_to_driver=False)
    except ConnectionError as error:
        raise InputError(
            f"--ray finds no cluster ({' '.join(str(error).split())[:120]}): start one with `ray start --head`, or "
            "name one by RAY_ADDRESS."
        ) from None
    try:
        count = actors or _devices(ray)
        options = {"max_restarts": -1, "max_concurrency": rows + 1, "scheduling_strategy": "SPREAD"}
        needs = needs_of_one(ray, count)
        tell_what_lacks(ray, needs, count, tell)
        made = ray.remote(**needs, **options)(Answerer)
        started = [made.remote(loading) for _ in range(count)]
        yield Pool(started, _draws(ray, started), ray.exceptions.RayActorError)
    finally:
        ray.shutdown()


def _draws(ray: Any, started: list[Any]) -> bool:
    """Once every actor has its model."""
    try:
        return ray.get([actor.draws.remote() for actor in started], timeout=PATIENCE_S)[0]
    except ray.exceptions.GetTimeoutError:
        raise InputError(f"the cluster had no room for {len(started)} actors in {PATIENCE_S:.0f} s.") from None
    except ray.exceptions.RayActorError as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(f"an actor could not load the model: {last}") from None


def _devices(ray: Any) -> int:
    """GPUs, or nodes where there are none."""
    return int(ray.cluster_resources().get("GPU", 0)) or max(1, len(_processors(ray)))


def _processors(ray: Any) -> list[int]:
    """Of each node that has any."""
    alive = (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return [int(cpus) for cpus in alive if cpus >= 1]


def needs_of_one(ray: Any, count: int) -> dict[str, Any]:
    """What an actor with a model asks of the cluster, where there are to be `count` of them.

    Raises InputError where there is no room for so many.
    """
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU", 0) else "CPU"
    if count > resources.get(kind, 0):
        room = int(resources.get(kind, 0))
        raise InputError(f"{count} models are asked for, but the cluster has {room} {kind}s, and each takes one.")
    if kind == "GPU":
        return {"num_gpus": 1}
    processors = _processors(ray)
    # A place costs one processor, so that it is found on any node; left to itself, Ray would allow one thread too.
    threads = max(1, min(max(processors), sum(processors) // count))
    told = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return {"num_cpus": 1, "runtime_env": {"env_vars": told}}


def tell_what_lacks(ray: Any, needs: Mapping[str, Any], count: int, tell: Callable[[str], None]) -> None:
    """Where others have what `count` actors are to have, tell for what these will wait. needs: as of `needs_of_one`."""
    kind = "GPU" if "num_gpus" in needs else "CPU"
    until = time.monotonic() + SETTLE_S
    while (free := ray.available_resources().get(kind, 0)) < count:
        if time.monotonic() > until:
            room = ray.cluster_resources().get(kind, 0)
            return tell(
                f"waiting for {kind}s: {count} asked for, {free:g} of the cluster's {room:g} free. It goes on once "
                "what holds them ends, or the cluster has another node."
            )
        time.sleep(LOOK_S)
    return None


def connect(ray: Any, log_to_driver: bool) -> None:
    """Join the cluster that RAY_ADDRESS names, or that runs on this machine. Raises ConnectionError where none does."""
    address = os.environ.get("RAY_ADDRESS") or "auto"
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=log_to_driver)


def import_ray(flag: str, module: str = "ray") -> Any:
    """Raises MissingDependency, by the flag that needs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependency(f"{flag} needs the package ray: pip install 'gemmakit[ray]'.") from None
