"""Batch files that survive anything: results appended as they come, a journal beside them, and what is done is known.

The files are the state. A kill at any moment leaves whole lines and perhaps a torn last one, which `open_run` cuts off;
only what was under way is run again.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gemmakit.errors import BatchStopped, InputError
from gemmakit.files import write_text
from gemmakit.serve.batch_format import BadRow, Row, dump_line, error_line, read_lines, read_rows, result_line

# What a server answers to a row: status and body.
Answer = Callable[[Row], Awaitable[tuple[int, Mapping[str, Any]]]]
SYNC_S = 1.0
BUSY, WAIT_S = 429, 0.05


class Appended:
    """A file of whole lines, for one process at a time: a torn last line is cut off when it is opened.

    Raises InputError for a file that another process writes, or that cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from None
        lock(self._file, path)
        self.size = _whole(self._file)
        os.ftruncate(self._file, self.size)

    def append(self, line: bytes) -> None:
        """All of the line or nothing of it. Raises OSError where the disk is full."""
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except BaseException:
            if written:
                os.ftruncate(self._file, self.size)
            raise
        self.size += written

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Appended:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Input:
    """A batch file: how many lines ask something, and the SHA-256 of its bytes."""

    path: Path
    rows: int
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Input:
        """Raises InputError for a file that cannot be read."""
        digest, count = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                for line in file:
                    digest.update(line)
                    count += bool(line.strip())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        return cls(path, count, digest.hexdigest())


@dataclass
class Run:
    """A batch at work: what is asked, what is done, and the files that say so. Made by `open_run`."""

    asked: Input
    output: Appended
    errors: Path
    journal: Appended
    done_ids: set[str]
    failed_lines: set[int]
    stack: ExitStack
    answers: int = 0
    failures: int = 0
    tokens: int = 0
    _failed: Appended | None = None
    _synced: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return len(self.done_ids) + len(self.failed_lines)

    def pending(self) -> Iterator[Row | BadRow]:
        """The rows that have no line yet."""
        with self.asked.path.open("rb") as file:
            for row in read_rows(read_lines(file)):
                known = row.line in self.failed_lines
                if not known and not (isinstance(row, Row) and row.custom_id in self.done_ids):
                    yield row

    def keep(self, row: Row | BadRow, status: int, result: Mapping[str, Any]) -> None:
        """Append what came of a row. Raises BatchStopped where it cannot be written."""
        try:
            if isinstance(row, Row) and status < 400:
                self.output.append(dump_line(result))
                self.done_ids.add(row.custom_id)
                self.answers += 1
            else:
                self._failed = self._failed or self.stack.enter_context(Appended(self.errors))
                self._failed.append(dump_line(result))
                self.failed_lines.add(row.line)
                self.failures += 1
            if time.monotonic() - self._synced > SYNC_S:
                self.sync()
        except OSError as error:
            raise self.stopped(_reason(error)) from None

    def sync(self) -> None:
        """Bring everything to the disk, and note how far this process came."""
        for file in (self.output, self._failed):
            if file is not None:
                file.sync()
        self.journal.append(dump_line({"done": self.done, "tokens": self.tokens}))
        self.journal.sync()
        self._synced = time.monotonic()

    def close(self) -> None:
        with suppress(OSError):
            self.sync()
        self.stack.close()

    def stopped(self, why: str) -> BatchStopped:
        kept = f"{self.done:,} of {self.asked.rows:,} rows are done and kept"
        return BatchStopped(f"{self.output.path}: {why}. {kept}; the same command with --resume does the others.")


def open_run(
    path: Path, output: Path, made_with: Mapping[str, Any], errors: Path | None = None, *, resume: bool = False
) -> Run:
    """A batch from `path` to `output`, begun or taken up where it was left.

    made_with: what the results depend on, by name; a batch begun with other values is refused by what differs.
    Raises InputError: files that cannot be read or written, an output that exists without `resume`, another process.
    """
    asked = Input.read(path)
    errors = errors or output.with_name(f"{output.name}.errors")
    header = {"input": asked.sha256, **made_with}
    journal_path = output.with_name(f"{output.name}.journal")
    if len({p.absolute() for p in (path, output, errors, journal_path)}) < 4:
        raise InputError(f"{path}, {output} and {errors}: input, output and errors must be different files.")
    _begin(journal_path, output, errors, header, resume)
    with ExitStack() as stack:
        journal = stack.enter_context(Appended(journal_path))
        out = stack.enter_context(Appended(output))
        done = {line.get("custom_id", "") for line in _lines(output)}
        failed = set[int]()
        if errors.exists():
            stack.enter_context(kept := Appended(errors))
            failed = {line.get("line", 0) for line in _lines(errors)}
            return Run(asked, out, errors, journal, done, failed, stack.pop_all(), _failed=kept)
        return Run(asked, out, errors, journal, done, failed, stack.pop_all())


class Work(Protocol):
    """What `run_batch` needs of a batch, wherever its results go."""

    tokens: int

    def pending(self) -> Iterator[Row | BadRow]: ...

    def keep(self, row: Row | BadRow, status: int, result: Mapping[str, Any]) -> None: ...

    def stopped(self, why: str) -> BatchStopped: ...


async def run_batch(run: Work, answer: Answer, concurrency: int, told: Callable[[], None] = lambda: None) -> None:
    """Ask for every pending row, `concurrency` at a time, and keep what comes.

    Raises BatchStopped: a disk that is full, or an answer that says the model cannot go on (status 500 and above).
    """
    rows = run.pending()

    async def work() -> None:
        for row in rows:
            if isinstance(row, BadRow):
                run.keep(row, 400, error_line(row))
            else:
                status, body = await settled(answer, row)
                if status >= 500:
                    raise run.stopped(f"line {row.line} met {status}: {_said(body)}")
                run.tokens += (body.get("usage") or {}).get("completion_tokens") or 0
                run.keep(row, status, result_line(row, status, body))
            told()

    workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def settled(answer: Answer, row: Row) -> tuple[int, Mapping[str, Any]]:
    """What is answered to a row, asked again for as long as the queue is full."""
    while True:
        status, body = await answer(row)
        if status != BUSY:
            return status, body
        await asyncio.sleep(WAIT_S)


def _begin(journal: Path, output: Path, errors: Path, header: Mapping[str, Any], resume: bool) -> None:
    """Write the journal's first line, or see that it is the one of this very batch."""
    if not output.parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}.")
    there = [p for p in (output, errors) if p.exists() and p.stat().st_size]
    if there and not resume:
        raise InputError(f"{there[0]} exists: name another output, or go on with --resume.")
    if there and not journal.exists():
        raise InputError(f"--resume: {there[0]} has no journal {journal}, so what it was made with is not known.")
    if not there:  # whatever was begun came to nothing
        try:
            write_text(journal, json.dumps(header, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"{journal} cannot be written: {error.strerror}.") from None
        return
    before = next(iter(_lines(journal)), {})
    for name in {**before, **header}:
        if before.get(name) != header.get(name):
            raise InputError(
                f"--resume: {name} is {header.get(name)!r:.80}, but {output} was begun with {before.get(name)!r:.80}. "
                "Give what it was begun with, or name another output."
            )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of whole lines. Raises InputError for a line that is damaged."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # torn; whoever opens the file to write cuts it off
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise InputError(f"{path}, line {number} is damaged: mend or remove it, then --resume.")
            yield found


def _whole(file: int) -> int:
    """Bytes up to the end of the last whole line."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - (1 << 16))
        at = os.pread(file, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise InputError(f"{path} is being written by another process. Wait for it, or end it.") from None


def _reason(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"the disk is full ({error.strerror}): free some space" if full else f"{error.strerror}"


def _said(body: Mapping[str, Any]) -> str:
    return str((body.get("error") or {}).get("message", body))[:300]
