"""The one check of settings: ranges, written beside the fields they are of, and the error that names all of it.

A dataclass says a field's range in its annotation, and `check_fields` reads it there:

    hidden_size: Annotated[int, Whole(1, 2**24)] = 3072
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, get_args, get_type_hints


class Range(Protocol):
    """What a value must be. `str` of it goes on after "it must be"."""

    def holds(self, value: Any) -> bool: ...


def is_whole(value: Any) -> bool:
    """Python's and numpy's integers; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number no float can hold
        return False


@dataclass(frozen=True)
class Whole:
    """A whole number in low..high."""

    low: int
    high: float = math.inf

    def holds(self, value: Any) -> bool:
        return is_whole(value) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number >= {self.low}" + ("" if self.high == math.inf else f" and at most {self.high}")


@dataclass(frozen=True)
class Real:
    """A finite number between low and high; `above` and `below` exclude the limit itself."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    remedy: str = ""

    def holds(self, value: Any) -> bool:
        if not is_finite(value):
            return False
        enough = value > self.low if self.above else value >= self.low
        return enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f" {'>' if self.above else '>='} {self.low}"
        high = "" if self.high == math.inf else f" {'<' if self.below else '<='} {self.high}"
        return f"a finite number{low}{' and' if low and high else ''}{high}{self.remedy}"


class OneOf:
    """One of a few values. 8.0 and True are not the numbers that they equal."""

    def __init__(self, *values: Any):
        self.values = values

    def holds(self, value: Any) -> bool:
        text = isinstance(value, str)
        return any(value == v for v in self.values if type(value) is type(v) or (text and isinstance(v, str)))

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"


@dataclass(frozen=True)
class Instance:
    """A value of a Python type, not empty; `said` in words."""

    types: tuple[type, ...]
    said: str

    def holds(self, value: Any) -> bool:
        return isinstance(value, self.types) and (isinstance(value, bool) or bool(value))

    def __str__(self) -> str:
        return self.said


class TokenIds:
    """A token id, or ids in lists as deep as one of `depths` (0 for an id by itself); no list of them empty.

    absent: whether -1, which released files write for "no such token", may stand for an id.
    """

    _SAID = (
        "a token id",
        "a list of token ids",
        "a list of lists of token ids",
        "lists of lists of lists of token ids",
    )

    def __init__(self, *depths: int, absent: bool = False):
        self.depths = depths
        self.absent = absent

    def holds(self, value: Any) -> bool:
        return _depth(value) in self.depths

    def __str__(self) -> str:
        return f"{' or '.join(self._SAID[d] for d in self.depths)}, none of them empty"

    def ids(self, value: Any) -> Iterator[Any]:
        """What stands in the lists, but for the absent."""
        return (token for token in _leaves(value) if not (self.absent and token == -1))


def _depth(value: Any) -> int | None:
    """How deep the lists are; None when they are uneven, or empty within (or, for nested ones, at all)."""
    if not isinstance(value, list | tuple):
        return 0
    inside = {_depth(v) for v in value}
    if not inside:
        return 1
    depth = inside.pop()
    if inside or depth is None or any(isinstance(v, list | tuple) and not v for v in value):
        return None
    return depth + 1


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


FLAG = OneOf(True, False)
TEXT = Instance((str,), "a text of at least 1 character")


def check(name: str, value: Any, allowed: Range, error: type[Exception]) -> None:
    """Raises `error` with the name, the value and the range unless the value is in it."""
    if not allowed.holds(value):
        raise error(f"{name} is {value!r}; it must be {allowed}.")


def check_fields(settings: Any, error: type[Exception], prefix: str = "", skip: Collection[str] = ()) -> None:
    """`check` every field of a dataclass that has a range, but for `skip`; None passes where the annotation has it."""
    for name, allowed in ranges(type(settings)).items():
        if name in skip:
            continue
        value = getattr(settings, name)
        if value is not None or name not in _may_be_none(type(settings)):
            check(prefix + name, value, allowed, error)


@cache
def ranges(cls: type) -> dict[str, Any]:
    """The fields of a class that have a range in their annotation, each with its range."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


@cache
def _may_be_none(cls: type) -> frozenset[str]:
    hints = get_type_hints(cls)
    return frozenset(name for name in ranges(cls) if type(None) in get_args(hints[name]))


# By the name of an argument: the values that change nothing, None for all there are, and why another is refused.
Accepted = Mapping[str, tuple[tuple[Any, ...] | None, str]]
# What other libraries' calls say of downloading.
DOWNLOADING: Accepted = {
    "resume_download": (None, ""),
    "force_download": ((None, False), "remove the repository from the cache, as `hf cache delete` does"),
    "proxies": ((None,), "set HTTPS_PROXY in the environment"),
}


def take_accepted(arguments: dict[str, Any], table: Accepted, error: type[Exception]) -> None:
    """Take out of a call what other libraries' calls give and what changes nothing here.

    Raises `error` for a value that would change the result and cannot be honoured.
    """
    for name in [name for name in arguments if name in table]:
        value, (allowed, why) = arguments.pop(name), table[name]
        if allowed is not None and not any(value is one for one in allowed):
            raise error(f"{name} is {value!r:.80}, which has no meaning here: {why}.")
