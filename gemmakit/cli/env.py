"""gemmakit env: versions for bug reports; machine, versions, date: what a number is worth nothing without."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from gemmakit import __version__


def env(json_: Annotated[bool, Option("--json", help="As a JSON object.")] = False) -> int:
    """List versions, for bug reports."""
    found = versions()
    width = max(map(len, found))
    lines = [f"{name:<{width}}  {version}" for name, version in found.items()]
    print(json.dumps(found, indent=2) if json_ else "\n".join(lines))
    return 0


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    return next(_cpuinfo("model name", "Model"), "") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    return set(next(_cpuinfo("flags", "Features"), "").split())


def _cpuinfo(*fields: str) -> Iterator[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return
    yield from (line.partition(":")[2].strip() for line in lines if line.startswith(fields))


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
    """A package's version; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions(*more: str) -> dict[str, str]:
    """gemmakit, Python, the system, and every installed package that gemmakit can use; `more` packages too."""
    found = {"gemmakit": __version__, "python": platform.python_version(), "system": platform.platform()}
    packages = {name: installed(name) for name in (*(name for name, _ in requirements()), *more)}
    return {**found, **{name: version for name, version in packages.items() if version is not None}}


def missing_extras() -> dict[str, list[str]]:
    """Extra -> its packages that are not installed."""
    missing: dict[str, list[str]] = {}
    for name, extra in requirements():
        if extra is not None and installed(name) is None:
            missing.setdefault(extra, []).append(name)
    return missing


def about(threads: int, *more: str) -> dict[str, Any]:
    """The head of a result's JSON."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {cpu_name()}, {available_cores()} cores",
        "threads": threads,
        "versions": versions(*more),
    }
