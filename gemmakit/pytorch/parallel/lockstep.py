"""One batch engine over processes that share a model: the first is asked, the others repeat what it was told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.batch import BatchEngine, Event, Request
from gemmakit.pytorch.parallel import processes

# A method of the engine, and what it was called with.
Call = tuple[str, Any]


class LeadingEngine(BatchEngine):
    """The engine of the first process: before each step the others hear what came in since the last one.

    A schedule follows from the requests alone, so what depends on the clock is refused: max_time and deadline.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._calls: list[Call] = []

    def add(self, request: Any) -> int:
        request = request if isinstance(request, Request) else Request(request)
        own: Any = request.generation_config or GenerationConfig()
        if request.deadline is not None or own.max_time or request.settings.get("max_time"):
            raise InputError(
                "max_time and deadlines end requests by a clock, and each process has its own: leave them."
            )
        id = super().add(request)
        prompt = request.prompt.tolist() if isinstance(request.prompt, Tensor) else [*request.prompt]
        self._calls.append(("add", (replace(request, prompt=prompt, tokenizer=None), request.tokenizer is not None)))
        return id

    def cancel(self, id: int) -> bool:
        self._calls.append(("cancel", id))
        return super().cancel(id)

    def step(self) -> list[Event]:
        calls, self._calls = self._calls, []
        processes.shared(calls)
        return super().step()

    def close(self) -> None:
        """Let the others end. They wait for ever otherwise."""
        processes.shared(None)


def follow(engine: BatchEngine, tokenizer: Any = None) -> None:
    """Do what the first process's engine does until it is closed. tokenizer: for requests that came with one."""
    while True:
        calls: list[Call] | None = processes.shared(None)
        if calls is None:
            return
        for name, told in calls:
            if name == "cancel":
                engine.cancel(told)
            else:
                request, reads_text = told
                engine.add(replace(request, tokenizer=tokenizer if reads_text else None))
        try:
            engine.step()
        except Exception:
            continue  # the first met the same, and says so
