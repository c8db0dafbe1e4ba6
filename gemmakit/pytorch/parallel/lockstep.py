"""One batch engine over processes that share a model: the first is asked, the others repeat what it was told."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.pytorch.decode.batch import BatchEngine, Event, Request
from gemmakit.pytorch.parallel import processes

# A method of the engine, and what it was called with.
Call = tuple[str, Any]


class LeadingEngine(BatchEngine):
    """The engine of the first process: at each step the others hear what came in since the last one.

    The rest of a schedule follows from that. What depends on the clock is decided here: which requests have waited too
    long.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._calls: list[Call] = []
        self._failed = False

    def add(self, request: Any) -> int:
        """As of an engine alone; InputError too for a request that cannot be pickled, as the others are sent it."""
        request = request if isinstance(request, Request) else Request(request)
        prompt = request.prompt.flatten().tolist() if isinstance(request.prompt, Tensor) else request.prompt
        told = replace(request, prompt=prompt, tokenizer=None, deadline=None)
        try:
            sent = pickle.dumps(told)
        except Exception as error:
            raise InputError(
                f"several processes share the model, and the request cannot be sent to the others ({error}): give "
                "processors and criteria that are defined in a module, or run the model in one process."
            ) from error
        id = super().add(request)
        self._calls.append(("add", (sent, request.tokenizer is not None)))
        return id

    def cancel(self, id: int) -> bool:
        self._calls.append(("cancel", id))
        return super().cancel(id)

    def step(self) -> list[Event]:
        try:
            return super().step()
        except Exception:
            self._failed = True
            raise

    def _expire(self) -> None:
        late = self._overdue()
        self.give_up(late)
        self._calls.append(("give_up", late))
        processes.shared((self._failed, self._calls))
        self._calls, self._failed = [], False

    def close(self) -> None:
        """Let the others end. They wait for ever otherwise."""
        processes.shared(None)


def follow(engine: BatchEngine, tokenizer: Any = None) -> None:
    """Do what the first process's engine does until it is closed. tokenizer: for requests that came with one.

    A step that fails in every process is repeated in every one. Raises what the first did not meet: this process would
    compute something else from there on.
    """
    met: Exception | None = None
    while True:
        told: tuple[bool, list[Call]] | None = processes.shared(None)
        if told is None:
            return
        failed, calls = told
        if met is not None and not failed:
            raise met
        for name, given in calls:
            if name == "add":
                sent, reads_text = given
                engine.add(replace(pickle.loads(sent), tokenizer=tokenizer if reads_text else None))
            else:
                getattr(engine, name)(given)
        met = None
        try:
            engine.step()
        except Exception as error:
            met = error
