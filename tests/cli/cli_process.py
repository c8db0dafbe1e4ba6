"""The real command in a process of its own: its command line and its environment."""

from __future__ import annotations

import os
import sys

# One thread: these models are too small for two, and other processes may want the cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gemmakit.cli", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **changes}
