"""Schemas, expressions and grammars from strangers: refused where they are too large or take too long to be made ready.

This happens beside the engine's thread, which finds them ready then: one that explodes there would hold up everybody.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from gemmakit.pytorch.decode.processors.grammar import SETTINGS, grammar_constraint
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.served import ServedModel

MAX_CHARACTERS = 2**18
# Of an expression with its counted repetitions written out; ten times this takes seconds for a single token.
MAX_EXPANDED = 50_000
_COUNT = re.compile(r"\{(\d{0,9})(?:,(\d{0,9}))?\}")
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


class Shapes:
    """Makes shapes ready, one at a time, each within `limit_s`."""

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self._thread = ThreadPoolExecutor(1, "gemmakit-shapes")

    async def check(self, served: ServedModel, settings: Mapping[str, Any]) -> None:
        """Raises Refusal for a shape that cannot be followed, and what GenerationConfig raises."""
        shape = {name: settings[name] for name in SETTINGS if name in settings}
        if not shape:
            return
        (name,) = shape if len(shape) == 1 else (" and ".join(shape),)
        _check_size(name, shape)
        loop = asyncio.get_running_loop()
        making = loop.run_in_executor(self._thread, _make, served, shape)
        try:
            await asyncio.wait_for(making, self.limit_s)
        except asyncio.TimeoutError:
            said = f"{name} was not ready to be followed within {self.limit_s:g} s: make it simpler."
            raise Refusal(400, said, param=name, code="too_complex") from None


def _make(served: ServedModel, shape: Mapping[str, Any]) -> None:
    """Compile it, which the engine need not then, and ask for the first token's mask."""
    config = served.pipe.model.generation_config.updated(**shape)
    constraint = grammar_constraint(config, served.tokenizer, served.vocabulary, 0)
    if constraint is not None:
        constraint(torch.zeros((1, 0), dtype=torch.long), torch.zeros((1, served.vocabulary)))


def _check_size(name: str, shape: Mapping[str, Any]) -> None:
    for value in shape.values():
        text = value if isinstance(value, str) else json.dumps(value)
        if len(text) > MAX_CHARACTERS:
            said = f"{name} has {len(text)} characters, but at most {MAX_CHARACTERS} are read."
            raise Refusal(400, said, param=name, code="too_complex")
        largest = max((expanded_size(part) for part in _expressions(value)), default=0)
        if largest > MAX_EXPANDED:
            said = (
                f"{name} repeats so much that it is over {MAX_EXPANDED} characters when written out: make it simpler."
            )
            raise Refusal(400, said, param=name, code="too_complex")


def _expressions(value: Any) -> Iterator[str]:
    """What is an expression, or holds some: a text; of a schema the patterns."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "pattern" or not isinstance(inner, str):
                yield from _expressions(inner)
            if key == "patternProperties" and isinstance(inner, Mapping):
                yield from inner
    elif isinstance(value, list):
        for inner in value:
            if not isinstance(inner, str):
                yield from _expressions(inner)


def expanded_size(expression: str) -> int:
    """How long a regular expression is with its counted repetitions written out, a set of characters being one."""
    groups, last, place = [0], [0], 0  # of each open group: its size without its last item, and that item's

    def close(size: int) -> None:
        groups[-1] += last[-1]
        last[-1] = size

    while place < len(expression):
        character = expression[place]
        counted, chosen = _COUNT.match(expression, place), _SET.match(expression, place)
        if counted is not None:
            last[-1] *= max([1, *(int(n) for n in counted.groups() if n)])
        elif character == "(":
            groups.append(0)
            last.append(0)
        elif character == ")" and len(groups) > 1:
            size = groups.pop() + last.pop()
            close(size)
        else:
            close(1)
        place = counted.end() if counted else chosen.end() if chosen else place + (2 if character == "\\" else 1)
    return sum(groups) + sum(last)
