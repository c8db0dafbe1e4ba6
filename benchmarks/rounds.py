"""Sides measured in turn, each in a fresh process; medians, and medians of each round's ratios."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gemmakit.bench.timing import TURN

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
    # Not a session of its own: whatever ends our process group ends the measurement too.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
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


def _environment() -> dict[str, str]:
    """gemmakit and the scripts here can be imported by the process, from wherever they are."""
    path = os.pathsep.join(p for p in (str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Measured(Protocol):
    """What measuring needs of a side."""

    @property
    def label(self) -> str: ...

    @property
    def command(self) -> list[str]: ...


class Started:
    """A side's process that waits for its turns, as timing.turn does."""

    def __init__(self, side: Measured):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - its errors, closed by `end`
        self._child = subprocess.Popen(
            side.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=_environment(),
        )

    def go(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()

    def said(self) -> tuple[Found, bool]:
        """What its run gave, and False; or all that it has to say, and True. Raises SideFailed where it has nothing."""
        assert self._child.stdout is not None
        line = ""
        for line in self._child.stdout:
            if line.startswith(TURN):
                return json.loads(line.removeprefix(TURN)), False
        code = self._child.wait()
        self._said.seek(0)
        err = self._said.read()
        if code:
            raise SideFailed(_why(err) or f"ended with code {code} and no message", err[-TAIL:])
        try:
            return json.loads(line), True
        except ValueError:
            raise SideFailed(f"printed no result: {line[-200:]!r}") from None

    def end(self) -> None:
        self._child.kill()
        self._child.communicate()
        self._said.close()


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


REST_S = 0.3  # for threads that spin a while for more work


def in_turn(sides: Iterable[Measured], *, say: Callable[[str], None] = lambda _: None) -> Rounds:
    """One process a side, all at once, which do their timed runs in turn: a round is one of each.

    For machines that are shared, where what others do changes from one minute to the next. A side that has no timed
    runs is measured once, before the next ones start. Ctrl-C ends it, and nothing is kept.
    """
    out = Rounds()
    started: dict[str, Started] = {}
    runs: dict[str, list[Found]] = {}  # what each timed run of a side gave
    whole: dict[str, Found] = {}  # and what it said at its end

    def listen(label: str) -> None:
        try:
            found, ended = started[label].said()
        except SideFailed as error:
            out.failed[label], found, ended = str(error), {}, True
        if not ended and found:
            runs[label].append(found)
        if ended:
            started.pop(label).end()
            if label not in out.failed:
                whole[label] = found

    try:
        for side in sides:
            say(f"starting {side.label}")
            started[side.label], runs[side.label] = Started(side), []
            listen(side.label)
        while started:
            for label in [*started]:
                time.sleep(REST_S)
                started[label].go()
                listen(label)
            if started:
                say(f"round {min(len(runs[label]) for label in started)} is done")
    except KeyboardInterrupt:
        return Rounds(interrupted=True)
    finally:
        for side in started.values():
            side.end()
    for label, rest in whole.items():
        for i, run in enumerate(runs[label] or [{}]):
            out.rounds.extend([{}] * (i + 1 - len(out.rounds)))
            out.rounds[i] = {**out.rounds[i], label: rest | run}
    return out
