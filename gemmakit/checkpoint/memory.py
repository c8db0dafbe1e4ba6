"""How much memory this process may still take, asked before a large allocation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from gemmakit.errors import NotEnoughMemory


def free_memory_bytes() -> int | None:
    """Bytes of host memory that can be taken without swapping, or None where the system does not say.

    On Linux the smallest of what the machine has and what the control groups of this process still allow; page cache
    that can be dropped counts as free.
    """
    if sys.platform == "win32":
        return _windows_free_bytes()
    machine = _meminfo_available_bytes(Path("/proc/meminfo"))
    groups = _cgroup_free_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min((free for free in (machine, *groups) if free is not None), default=None)


def require_memory(needed_bytes: int, what: str, *, remedy: str = "", free: int | None = None) -> None:
    """NotEnoughMemory if `needed_bytes` are more than what is free; says nothing where that is not known.

    `what` names the thing in the message ("the weights of google/gemma-7b"); `remedy` replaces the general advice;
    `free`: bytes, of a device that is not the host.
    """
    free = free_memory_bytes() if free is None else free
    if free is None or needed_bytes <= free:
        return
    advice = remedy or "Close other programs, or choose a smaller dtype, a quantized model or a larger machine."
    raise NotEnoughMemory(
        f"{what} needs {needed_bytes} bytes ({needed_bytes / 1e9:.1f} GB), "
        f"but only {free} bytes ({free / 1e9:.1f} GB) are free. {advice}"
    )


def _meminfo_available_bytes(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_free_bytes(membership: Path, mount: Path) -> Iterator[int]:
    """What each control group above this process still allows, in bytes; version 2 and version 1 layouts."""
    for line in _lines(membership):
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            yield from _walk(mount, group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _walk(mount / "memory", group, *names)


def _walk(mount: Path, group: str, limit_name: str, usage_name: str, reclaimable_name: str) -> Iterator[int]:
    # Inside a container the group's own path is often not visible and its limit stands at the mount's root.
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            yield max(0, limit - usage + _stat(folder / "memory.stat", reclaimable_name))


def _stat(path: Path, name: str) -> int:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _windows_free_bytes() -> int | None:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            ("total", ctypes.c_ulonglong),
            ("available", ctypes.c_ulonglong),
            ("others", ctypes.c_ulonglong * 5),
        )

    status = Status(length=ctypes.sizeof(Status))
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.available)
