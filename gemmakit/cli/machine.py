"""Facts about this machine and installation. Nothing here fails for want of a package or a device."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from gemmakit import __version__
from gemmakit.bench.facts import available_cores, cpu_name, cpuinfo
from gemmakit.checkpoint.memory import free_memory_bytes

# Instructions that multiply bfloat16 directly; without one of them it is emulated, slower than float32.
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16", "svebf16")


def versions() -> dict[str, str]:
    """What a bug report needs: gemmakit, Python, the system, and every installed package that gemmakit can use."""
    found = {"gemmakit": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name, _ in requirements():
        version = installed(name)
        if version is not None:
            found[name] = version
    return found


def requirements() -> Iterator[tuple[str, str | None]]:
    """(package, extra) of everything gemmakit may use; the extra is None where the package is always needed."""
    try:
        lines = metadata.requires("gemmakit") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if name is None or name[0] == "gemmakit" or (extra is not None and extra[1] in ("all", "docs", "test")):
            continue
        yield name[0], None if extra is None else extra[1]


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def missing_extras() -> dict[str, list[str]]:
    """Extra -> its packages that are not installed."""
    missing: dict[str, list[str]] = {}
    for name, extra in requirements():
        if extra is not None and installed(name) is None:
            missing.setdefault(extra, []).append(name)
    return missing


def cpu() -> dict[str, Any]:
    import torch

    flags = cpu_flags()
    return {
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": available_cores(),
        "free_bytes": free_memory_bytes(),
        "bfloat16": [flag for flag in BF16_FLAGS if flag in flags],
        "vectors": str(torch.backends.cpu.get_cpu_capability()),
    }


def cpu_flags() -> set[str]:
    for line in cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def accelerators() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append({
            "device": f"cuda:{index}", "name": properties.name, "free_bytes": free, "total_bytes": total,
            "capability": f"{properties.major}.{properties.minor}", "bfloat16": properties.major >= 8,
        })  # fmt: skip
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": cpu_name(), "free_bytes": free_memory_bytes(), "bfloat16": True})
    return found
