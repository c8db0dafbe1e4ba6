"""A bar on a terminal's stderr, once the work has taken a moment; elsewhere nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

PROGRESS_AFTER_S = 2.0


def with_progress(results: Iterator[Any], total: int, clock: Callable[[], float] = time.monotonic) -> Iterator[Any]:
    """The results, with a bar where there are several."""
    if total < 2:
        yield from results
        return
    with progress_bar("items", clock) as tell:
        for done, result in enumerate(results, 1):
            if tell is not None:
                tell(done, total)
            yield result


@contextmanager
def progress_bar(
    unit: str, clock: Callable[[], float] = time.monotonic
) -> Generator[Callable[..., None] | None, None, None]:
    """What to tell of progress, f(done, total, name=of what is at work); None where there is no terminal.

    unit: what `done` and `total` count: "items", "bytes", or "parts" that have names.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    start, bar, task = clock(), None, None

    def tell(done: int, total: int, name: str = "") -> None:
        nonlocal bar, task
        if bar is None and done < total and clock() - start > PROGRESS_AFTER_S:
            bar = _rich_bar(unit)
            task = bar.add_task("", total=total)
        if bar is not None:
            bar.update(task, completed=done, total=total, description=name)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.stop()


def _rich_bar(unit: str) -> Any:
    from rich import progress
    from rich.console import Console

    counted: dict[str, tuple[progress.ProgressColumn, ...]] = {
        "items": (progress.MofNCompleteColumn(),),
        "bytes": (progress.DownloadColumn(), progress.TransferSpeedColumn()),
        "parts": (progress.TextColumn("{task.percentage:3.0f} %"),),
    }
    columns = (progress.BarColumn(), *counted[unit], progress.TimeRemainingColumn())
    name = progress.TextColumn("{task.description}")
    bar = progress.Progress(*columns, name, console=Console(stderr=True), transient=True)
    bar.start()
    return bar
