"""The progress bar of long inputs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

PROGRESS_AFTER_S = 2.0


def with_progress(results: Iterator[Any], total: int, clock: Callable[[], float] = time.monotonic) -> Iterator[Any]:
    """The results; on a terminal, when they take more than a moment, with a bar on stderr."""
    if total < 2 or not sys.stderr.isatty():
        yield from results
        return
    start, bar, task = clock(), None, None
    try:
        for done, result in enumerate(results, 1):
            if bar is None and done < total and clock() - start > PROGRESS_AFTER_S:
                bar = _bar()
                task = bar.add_task("", total=total)
            if bar is not None and task is not None:
                bar.update(task, completed=done)
            yield result
    finally:
        if bar is not None:
            bar.stop()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.start()
    return bar
