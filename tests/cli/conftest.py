"""The real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]

# One thread: these models are too small for two, and other processes may want the cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gemmakit.cli", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **changes}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_checkpoint import make

    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def gemmakit() -> Command:
    """Run a command line; `stdin` is text or bytes."""

    def run(*arguments: object, stdin: str | bytes = b"", **environ: str) -> subprocess.CompletedProcess[str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            command_line(*arguments), input=data, capture_output=True, timeout=120, env=environment(**environ)
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run
