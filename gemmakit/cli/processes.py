"""--tensor N, --devices N: the same command as N processes, which share a model. The first alone reads and writes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from gemmakit.cli import shell
from gemmakit.errors import InputError

LOOK_S, PATIENCE_S = 0.05, 10.0
# How a verb ends by itself, having said why.
_SAID = (0, shell.FAILED, shell.INTERRUPTED, shell.PIPE_CLOSED)


def spread(count: int | None, flag: str = "--tensor") -> int | None:
    """Run this command as `count` processes and give their exit code; None in each of them, and where one is enough.

    Processes that torchrun started are these already. Raises InputError where they are not `count`.
    """
    if count is None:
        return None
    if "RANK" in os.environ:
        if os.environ.get("WORLD_SIZE") != str(count):
            raise InputError(f"{flag} is {count}, but torchrun started {os.environ.get('WORLD_SIZE')} processes.")
        if not is_first(count):
            sys.stdin, sys.stdout = open(os.devnull), open(os.devnull, "w")  # noqa: SIM115
        return None
    return None if count == 1 else _run(count)


def is_first(count: int | None) -> bool:
    """Whether this process is the one that reads and writes. count: how many share the model; None: it has its own."""
    return count is None or os.environ.get("RANK", "0") == "0"


def shared_texts(texts: Iterable[str], count: int) -> Iterator[str]:
    """The texts of the first of so many processes, in every process, as they come."""
    from gemmakit.pytorch.parallel import processes

    rest = iter(texts)
    while (text := processes.shared(next(rest, None) if is_first(count) else None)) is not None:
        yield text


def _run(count: int) -> int:
    """The first process has this one's streams and hears Ctrl-C; the others end with it, and it with this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, len(os.sched_getaffinity(0)) // count)) if hasattr(os, "sched_getaffinity") else "1"
    told = {"OMP_NUM_THREADS": threads, **os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "gemmakit.cli", *shell.command]
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
    first: subprocess.Popen[Any] | None = None
    started: list[tuple[subprocess.Popen[Any], IO[bytes]]] = []
    with _uninterrupted() as asked:
        try:
            first = subprocess.Popen(command, env={**told, "RANK": "0", "LOCAL_RANK": "0"})
            for rank in range(1, count):
                errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
                own = {**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append((subprocess.Popen(command, env=own, stderr=errors, **quiet), errors))
            code, left, told_to_end = None, PATIENCE_S, False
            while code is None and left > 0:
                while asked:
                    asked.pop()
                    told_to_end = True
                    first.terminate()
                code = _wait(first, LOOK_S)
                if any(process.poll() for process, _ in started):
                    left -= LOOK_S
            if code is None:
                first.kill()
            if code not in _SAID and not told_to_end:
                _tell(started)
            if code not in (0, shell.INTERRUPTED, shell.PIPE_CLOSED) and not told_to_end:
                _tell_signals([code, *(process.poll() for process, _ in started)])
            if code is None:
                return shell.FAILED
            return code if code >= 0 else 128 - code  # as a shell tells of a signal
        finally:
            if first is not None and first.poll() is None:
                first.terminate()
                if _wait(first, PATIENCE_S) is None:
                    first.kill()
                    first.wait()
            for process, errors in started:
                process.kill()
                process.wait()
                errors.close()


@contextmanager
def _uninterrupted() -> Generator[list[int], None, None]:
    """The SIGTERMs that came and are to be passed on, while no signal stops this process halfway.

    Ctrl-C is left to the first process, which the terminal tells too.
    """
    asked: list[int] = []
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of nohup: those who are started inherit that
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[Any], seconds: float) -> int | None:
    """Its exit code; None where it runs on."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _tell(started: Iterable[tuple[subprocess.Popen[Any], IO[bytes]]]) -> None:
    """What those said that have failed."""
    for process, errors in started:
        if process.poll():
            errors.seek(0)
            sys.stderr.write(errors.read().decode(errors="replace"))


def _tell_signals(codes: Sequence[int | None]) -> None:
    """Which of the processes a signal ended: they had no time to say it."""
    for place, code in enumerate(codes, 1):
        if code is not None and code < 0:
            why = ", as a system does that has no memory left" if code == -signal.SIGKILL else ""
            shell.note(f"process {place} of {len(codes)} was ended by signal {-code} ({signal.strsignal(-code)}){why}.")
