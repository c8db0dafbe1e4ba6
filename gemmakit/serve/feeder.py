"""Stored batches, worked off behind what clients wait for: a row is asked when the engine has room to spare."""

from __future__ import annotations

import asyncio
import io
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from gemmakit.errors import BatchStopped
from gemmakit.serve.batch_format import BadRow, Row, dump_line, error_line, read_lines, read_rows
from gemmakit.serve.batch_runner import run_batch
from gemmakit.serve.store import Pieces, Store

MAX_ROWS = 50_000
RETRY_S, SWEEP_S = 5.0, 60.0
ENDED = ("completed", "failed", "expired", "cancelled")


class StoredBatch:
    """A batch of the store as `run_batch` sees it."""

    def __init__(self, store: Store, batch: Mapping[str, Any]):
        self.store, self.batch = store, batch
        self.tokens = 0

    def rows(self) -> Iterator[Row | BadRow]:
        file: Any = io.BufferedReader(Pieces(self.store.content(self.batch["input_file_id"])))
        return read_rows(read_lines(file), self.batch["endpoint"])

    def pending(self) -> Iterator[Row | BadRow]:
        """The rows that have no line yet."""
        done = self.store.lines_done(self.batch)
        return (row for row in self.rows() if row.line not in done)

    def keep(self, row: Row | BadRow, status: int, result: Mapping[str, Any]) -> None:
        try:
            self.store.keep(self.batch, row.line, dump_line(result), status >= 400)
        except sqlite3.Error as error:
            raise self.stopped(str(error)) from None

    def stopped(self, why: str) -> BatchStopped:
        return BatchStopped(f"{self.batch['id']} waits: {why}.")


class Feeder:
    """One batch after another, the oldest first, in the event loop that `run` is awaited in.

    answer: what the server says to a row of an owner. room: whether a row may be asked now. A batch that stops (a full
    disk, a server that drains) is taken up again by this or the next process.
    """

    def __init__(
        self,
        store: Store,
        answer: Callable[[str, Row], Awaitable[tuple[int, Mapping[str, Any]]]],
        room: Callable[[], bool],
        concurrency: int,
    ):
        self.store, self.answer, self.room, self.concurrency = store, answer, room, concurrency
        self._wake = asyncio.Event()
        self._at_work: tuple[str, asyncio.Task[None]] | None = None

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()

    def cancel(self, name: str) -> None:
        """Stop a batch whose status says so already."""
        if self._at_work is not None and self._at_work[0] == name:
            self._at_work[1].cancel()
        self.wake()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            try:
                while batches := self.store.unfinished():
                    await self._work_on(batches[0])
                self.store.sweep()
            except (BatchStopped, sqlite3.Error):
                await asyncio.sleep(RETRY_S)
                continue
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), SWEEP_S)

    async def _work_on(self, batch: dict[str, Any]) -> None:
        """As a task of its own, which `cancel` can end alone."""
        task = asyncio.ensure_future(self._work(batch))
        self._at_work = (batch["id"], task)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            await asyncio.wait([task])
            self._at_work = None
        if not task.cancelled():
            task.result()

    async def _work(self, batch: dict[str, Any]) -> None:
        stored, name = StoredBatch(self.store, batch), batch["id"]
        if batch["status"] == "cancelling":
            return self.store.finish(name, "cancelled")
        if batch["status"] == "validating" and not self._begin(stored):
            return None
        try:
            left = max(0.0, batch["expires_at"] - time.time())
            await asyncio.wait_for(run_batch(stored, self._answer(batch), self.concurrency), left)
        except asyncio.TimeoutError:
            for row in stored.pending():
                late = BadRow(row.line, "batch_expired", f"line {row.line}: the batch's time ended.", row.custom_id)
                stored.keep(row, 408, error_line(late))
            return self.store.finish(name, "expired")
        self.store.set_status(name, "finalizing")
        return self.store.finish(name, "completed")

    def _begin(self, stored: StoredBatch) -> bool:
        """Count the rows; whether there is anything to do. A file without rows, or with too many, fails as a whole."""
        total, name = sum(1 for _ in stored.rows()), stored.batch["id"]
        if not 1 <= total <= MAX_ROWS:
            message = f"the file has {total} rows; a batch has 1 to {MAX_ROWS}."
            code = "empty_file" if total == 0 else "too_many_tasks"
            data = [{"code": code, "message": message, "line": None, "param": None}]
            self.store.set_status(name, "failed", total=total, errors={"object": "list", "data": data})
            return False
        self.store.set_status(name, "in_progress", total=total)
        return True

    def _answer(self, batch: Mapping[str, Any]) -> Callable[[Row], Awaitable[tuple[int, Mapping[str, Any]]]]:
        async def answer(row: Row) -> tuple[int, Mapping[str, Any]]:
            while not self.room():
                await asyncio.sleep(0.02)
            return await self.answer(batch["owner"], row)

        return answer
