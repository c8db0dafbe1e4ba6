"""What every side does: run the part that its one argument, a JSON object (the spec), names, and print a JSON object.

Fields of a spec besides those of timing.Work: part ("generate" if left out), threads, dtype, device; model (a folder)
or config (fields, for random weights).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from gemmakit.bench import timing

Part = Callable[[dict[str, Any]], dict[str, Any]]


class Said:
    """The lines that a package logs, and warnings: why something went another way than it might have."""

    def __init__(self, package: str):
        self.lines: dict[str, None] = {}
        handler = logging.Handler()
        handler.emit = self._emit
        logging.captureWarnings(True)
        for name in (package, "py.warnings"):
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(logging.DEBUG)

    def _emit(self, record: logging.LogRecord) -> None:
        self.lines.setdefault(record.getMessage().strip()[:500])


def tidy(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers to five digits, for reading."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}


def first_ids(run: timing.Run, count: int = 4) -> list[int]:
    """What a run generates first: that the weights are the ones that were to be read is seen by it."""
    found: list[int] = []
    run(0, count, SimpleNamespace(put=lambda token: found.append(int(token))))
    return found


def main(parts: dict[str, Part], listen_to: str | None = None) -> None:
    """The part gets what the package `listen_to` says meanwhile as spec["said"]."""
    spec = json.loads(sys.argv[1])
    if listen_to is not None:
        spec["said"] = Said(listen_to).lines
    print(json.dumps(tidy(parts[spec.get("part", "generate")](spec))), flush=True)
