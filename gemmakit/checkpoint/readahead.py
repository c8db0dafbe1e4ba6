"""Bring a checkpoint's bytes into memory while the program does something else: import torch, read a tokenizer.

Both steps below are wishes that the system may refuse, never change a result, and run in threads that end with the
program. Neither asks for more than the free memory: what is read ahead and thrown out again is read twice.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemmakit.checkpoint.memory import free_memory_bytes
from gemmakit.hub import Name

# Small enough that a thread ends, and lets go of the lock on the process's memory map, within some milliseconds.
STEP_BYTES = 16 << 20
_POPULATE_READ = 22  # Linux 5.14 and later
_asked: dict[Path, tuple[int, int]] = {}  # size and time of change of what was read ahead once


def read_ahead(files: Iterable[Path]) -> threading.Thread | None:
    """Ask the system to read whole files into its page cache, in their order; returns at once.

    None where there is nothing to do: no such call on this system, files that this process asked for before, no free
    memory.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    budget, chosen = _budget(), list[tuple[Path, int]]()
    for path in files:
        stamp = _stamp(path)
        if stamp is not None and stamp != _asked.get(path) and stamp[0] <= budget:
            budget -= stamp[0]
            _asked[path] = stamp
            chosen.append((path, stamp[0]))
    if not chosen:
        return None
    thread = threading.Thread(target=_advise, args=(chosen,), name="gemmakit read-ahead", daemon=True)
    thread.start()
    return thread


def weights_at(name_or_path: Name, subfolder: str = "") -> list[Path]:
    """The weight files that a folder, or a file itself, holds; empty for what has to be looked up or is not there."""
    try:
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return [path]
        whole = path / subfolder / "model.safetensors"
        return [whole] if whole.is_file() else sorted(whole.parent.glob("model-*-of-*.safetensors"))
    except (OSError, RuntimeError, TypeError, ValueError):
        return []  # whoever opens it says what is wrong with the name


def fault_in(pieces: Sequence[tuple[int, int]], keep: Any) -> threading.Thread | None:
    """Enter mapped memory, (address, bytes) each, into this process's page tables, in a thread; returns at once.

    A first pass over mapped weights otherwise stops at every few pages. keep: what owns the memory; it is held as long.
    None where the system has no such call or the memory is not there.
    """
    advise = _madvise()
    if advise is None or sum(size for _, size in pieces) > _budget():
        return None
    thread = threading.Thread(target=_populate, args=(advise, pieces, keep), name="gemmakit fault-in", daemon=True)
    thread.start()
    return thread


def _budget() -> int:
    free = free_memory_bytes()
    return 0 if free is None else free


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _advise(files: Sequence[tuple[Path, int]]) -> None:
    try:
        for path, size in files:
            with path.open("rb") as file:
                for start in range(0, size, STEP_BYTES):
                    os.posix_fadvise(file.fileno(), start, STEP_BYTES, os.POSIX_FADV_WILLNEED)
    except OSError:
        return  # whoever needs the file will say what is wrong with it


def _populate(advise: Any, pieces: Sequence[tuple[int, int]], keep: Any) -> None:
    for address, size in pieces:
        first = address // mmap.PAGESIZE * mmap.PAGESIZE
        for start in range(first, address + size, STEP_BYTES):
            if advise(start, min(STEP_BYTES, address + size - start), _POPULATE_READ):
                return  # an older kernel, or too little memory: pages then come as they are touched


def _madvise() -> Any:
    try:
        advise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise if os.uname().sysname == "Linux" else None
