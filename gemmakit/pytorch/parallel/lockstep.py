"""One batch engine over processes that share a model: the first is asked, the others repeat what it was told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.batch import BatchEngine, Request
from gemmakit.pytorch.parallel import processes

# A method of the engine, and what it was called with.
Call = tuple[str, Any]


class LeadingEngine(BatchEngine):
    """The engine of the first process: at each step the others hear what came in since the last one.

    The rest of a schedule follows from that. What depends on the clock is decided here: which requests have waited too
    long; and max_time, by which answers would end at other tokens in other processes, is refused.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._calls: list[Call] = []

    def add(self, request: Any) -> int:
        request = request if isinstance(request, Request) else Request(request)
        own: Any = request.generation_config or GenerationConfig()
        if own.max_time or request.settings.get("max_time"):
            raise InputError("max_time ends answers by a clock, of which each process has its own: leave it out.")
        id = super().add(request)
        prompt = request.prompt.tolist() if isinstance(request.prompt, Tensor) else [*request.prompt]
        told = replace(request, prompt=prompt, tokenizer=None, deadline=None)
        self._calls.append(("add", (told, request.tokenizer is not None)))
        return id

    def cancel(self, id: int) -> bool:
        self._calls.append(("cancel", id))
        return super().cancel(id)

    def _expire(self) -> None:
        late = self._overdue()
        calls, self._calls = [*self._calls, ("give_up", late)], []
        processes.shared(calls)
        self.give_up(late)

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
            if name == "add":
                request, reads_text = told
                engine.add(replace(request, tokenizer=tokenizer if reads_text else None))
            else:
                getattr(engine, name)(told)
        try:
            engine.step()
        except Exception:
            continue  # the first met the same, and says so
