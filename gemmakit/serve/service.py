"""What the routes share: the model once it is loaded, its worker, and whether new work is taken."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from fastapi import Request
from starlette.datastructures import State

from gemmakit.errors import QueueFull
from gemmakit.pytorch.decode import batch
from gemmakit.serve.generation import Answers
from gemmakit.serve.protocol import Body
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.served import ServedModel
from gemmakit.serve.settings import ServeSettings
from gemmakit.serve.worker import Worker

# Names of unknown fields that are counted each by itself; a client can make up any number.
MAX_NAMES = 64
RETRY_AFTER_S = 1


class Service:
    """One model, one worker. Both are None while the model loads; `draining` once the server is to end."""

    def __init__(self, settings: ServeSettings | None = None):
        self.settings = settings or ServeSettings()
        self.model: ServedModel | None = None
        self.worker: Worker | None = None
        self.draining = False
        self.unknown_fields: Counter[str] = Counter()

    def open(self, model: ServedModel, worker: Worker) -> None:
        self.model, self.worker = model, worker

    @property
    def state(self) -> str:
        """ "ready", or why not: "loading", "draining", "failed"."""
        if self.worker is not None and self.worker.error is not None:
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self.worker is None else "ready"

    def ready(self, name: str | None = None) -> ServedModel:
        """The model, which clients may call `name`. Raises Refusal while there is none, or no work is taken."""
        if self.state != "ready":
            raise Refusal(503, f"the server is {self.state}.", code=self.state, headers={"Retry-After": "5"})
        model = cast(ServedModel, self.model)
        model.check_name(name)
        return model

    def count_unknown(self, body: Body) -> None:
        for name in body.unknown:
            known = name in self.unknown_fields or len(self.unknown_fields) < MAX_NAMES
            self.unknown_fields[name[:64] if known else "(others)"] += 1

    async def answers(self, request: Request, requests: Sequence[batch.Request]) -> Answers:
        """Hand requests to the engine. Raises Refusal, and what `BatchEngine.add` raises."""
        answers = Answers(cast(Worker, self.worker), requests, self.settings.buffered_events)
        try:
            await answers.start()
        except QueueFull as error:
            raise Refusal(429, str(error), code="queue_full", headers={"Retry-After": str(RETRY_AFTER_S)}) from None
        request.state.answers = answers  # for the line in the log
        return answers


def service_of(request: Request) -> Service:
    return cast(State, request.app.state).service


def salt_of(request: Request) -> str:
    """Prefixes are shared among those who ask with the same key."""
    key: Any = getattr(request.state, "api_key", None)
    return "" if key is None else f"key {hashlib.sha256(key.encode()).hexdigest()}"
