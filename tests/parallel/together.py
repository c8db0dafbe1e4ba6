"""Starts a script as several processes that meet, as torchrun would, and gives what each printed last as JSON."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def together(script, *arguments, size=2, timeout_s=600, **environment):
    """One result a process. A process that fails ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "tests", "benchmarks"))
    told = {
        **os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment,
    }  # fmt: skip
    command = [sys.executable, str(script), *map(str, arguments)]
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in range(size)]
        started = [
            subprocess.Popen(
                command, env={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=out, stderr=errors
            )
            for rank, (out, errors) in enumerate(files)
        ]
        end = time.monotonic() + timeout_s
        try:
            while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
                assert time.monotonic() < end, f"not done in {timeout_s} s"
                time.sleep(0.02)
        finally:
            for process in started:
                process.kill()
                process.wait()
        for _, errors in files:
            errors.seek(0)
        said = [errors.read()[-3000:] for _, errors in files]
        failed = [i for i, process in enumerate(started) if process.returncode > 0]
        assert not failed, said[failed[0]]
        for out, _ in files:
            out.seek(0)
        return [json.loads(out.read().splitlines()[-1]) for out, _ in files]
