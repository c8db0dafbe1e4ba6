"""Sides measured in turn, each in a fresh process; medians, and medians of each round's ratios."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
SIDES = HERE / "sides"
Found = dict[str, Any]
Round = dict[str, Found]
TAIL = 3000  # characters


class SideFailed(Exception):
    """A side's process ended without a result; the message is the line that says why, `tail` the end of all it said."""

    def __init__(self, message: str, tail: str = ""):
        super().__init__(message)
        self.tail = tail


@dataclass(frozen=True)
class Side:
    """One thing to measure: its label in tables, its script, what it is told, whose interpreter runs it."""

    label: str
    script: str
    spec: Mapping[str, Any]
    python: str = sys.executable

    @property
    def command(self) -> list[str]:
        return [self.python, str(SIDES / f"{self.script}.py"), json.dumps(dict(self.spec))]


def run_command(command: Sequence[str], timeout_s: float | None = None) -> Found:
    """The JSON object that a command prints last. Ctrl-C ends it too. Raises SideFailed."""
    environment = {**os.environ, "PYTHONPATH": _path(), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # Not a session of its own: whatever ends our process group ends the measurement too.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise SideFailed(f"took longer than the {timeout_s:.0f} s it was given", _ended(child)) from None
    finally:
        if child.poll() is None:
            _ended(child)
    if child.returncode:
        raise SideFailed(_why(err) or f"ended with code {child.returncode} and no message", err[-TAIL:])
    try:
        return json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        raise SideFailed(f"printed no result: {out[-200:]!r}") from None


def _ended(child: subprocess.Popen[str]) -> str:
    """The end of what it said until it was killed."""
    child.kill()
    with suppress(subprocess.TimeoutExpired):  # a compiler's processes may hold the pipes open
        return child.communicate(timeout=5)[1][-TAIL:]
    return ""


def _why(err: str) -> str:
    """The line of an error among what torch adds behind it ("For debugging consider ..."); else the last line."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Refused|Interrupt)\b", line)]
    return (errors or lines or [""])[-1][:500]


def _path() -> str:
    """gemmakit and the scripts here can be imported by the process, from wherever they are."""
    return os.pathsep.join(p for p in (str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")) if p)


@dataclass
class Rounds:
    """What came of each side in each round; `failed` says why a side was left out from then on."""

    rounds: list[Round] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for found in self.rounds for label in found))

    def medians(self, label: str) -> Found:
        """The side's numbers, each the median of the rounds; what is no number is that of the last round."""
        found = [r[label] for r in self.rounds if label in r]
        return {key: median_of([f[key] for f in found if key in f]) for key in found[-1]}

    def ratios(self, ours: str, theirs: str) -> dict[str, float]:
        """ours / theirs for each number that both have: the median over the rounds with both."""
        both = [(r[ours], r[theirs]) for r in self.rounds if ours in r and theirs in r]
        keys = [k for k, v in both[0][0].items() if is_number(v)] if both else []
        out: dict[str, float] = {}
        for key in keys:
            pairs = [(a[key], b[key]) for a, b in both if is_number(a.get(key)) and b.get(key)]
            if pairs:
                out[key] = round(statistics.median(a / b for a, b in pairs), 4)
        return out


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def median_of(values: list[Any]) -> Any:
    return statistics.median(values) if all(is_number(v) for v in values) else values[-1]


class Measured(Protocol):
    """What `interleave` needs of a side."""

    @property
    def label(self) -> str: ...

    @property
    def command(self) -> list[str]: ...


def interleave(
    sides: Iterable[Measured],
    rounds: int,
    *,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[Rounds], None] = lambda _: None,
    run: Callable[[Sequence[str]], Found] = run_command,
) -> Rounds:
    """A, B, A, B ...; `keep` is called after every measurement. Ctrl-C ends it and keeps what there is."""
    sides, out = list(sides), Rounds()
    try:
        for number in range(1, rounds + 1):
            out.rounds.append({})
            for side in sides:
                if side.label in out.failed:
                    continue
                say(f"round {number} of {rounds}: {side.label}")
                try:
                    out.rounds[-1][side.label] = run(side.command)
                except SideFailed as error:
                    out.failed[side.label] = str(error)
                keep(out)
    except KeyboardInterrupt:
        out.interrupted = True
    out.rounds = [found for found in out.rounds if found]
    keep(out)
    return out
