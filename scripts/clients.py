"""Run tests/clients: each script in the environment that its client needs, made the first time under .venv/clients.

An environment sees the packages of the one that runs this (torch, transformers, pytest) and puts its own before them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from environments import environment, listed

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "clients"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", help="which; all without any")
    parser.add_argument("--folder", type=Path, default=Path(sys.prefix) / "clients", help="where environments are kept")
    given = parser.parse_args()
    needed = listed(SCRIPTS / "environments.txt")
    there = sorted(path.stem.removeprefix("test_client_") for path in SCRIPTS.glob("test_*.py"))
    if unknown := {*given.clients} - {*there}:
        parser.error(f"no script for {', '.join(sorted(unknown))}; there are {', '.join(there)}.")
    failed = []
    for client in given.clients or there:
        calls = needed.get(client)
        python = Path(sys.executable) if calls is None else environment(given.folder / client, calls, beneath=True)
        run = [python, "-m", "pytest", "-m", "client", f"tests/clients/test_client_{client}.py"]
        print(f"== {client}: {' '.join(p for call in calls or [['as the tests']] for p in call)}", flush=True)
        if subprocess.run(run, cwd=ROOT, env={**os.environ, "GEMMAKIT_CLIENTS": "1"}, check=False).returncode:
            failed.append(client)
    print(f"{len(given.clients or there) - len(failed)} clients passed, {len(failed)} failed", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
