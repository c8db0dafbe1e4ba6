"""Run tests/clients: each script in the environment that its client needs, made the first time under .venv/clients.

An environment sees the packages of the one that runs this (torch, transformers, pytest) and puts its own before them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "clients"


def requirements() -> dict[str, list[str]]:
    """Client -> what pip installs for it."""
    lines = (SCRIPTS / "environments.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(":", 1) for line in lines if line and not line.startswith("#"))
    return {name: packages.split() for name, packages in pairs}


def environment(folder: Path, packages: list[str]) -> Path:
    """The Python of a virtual environment with these packages; an existing one is kept while they are the same."""
    python, wanted = folder / "bin" / "python", folder / "requirements.txt"
    text = "\n".join(packages)
    if wanted.exists() and wanted.read_text(encoding="utf-8") == text:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    beneath = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (site / "beneath.pth").write_text(beneath, encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True)
    wanted.write_text(text, encoding="utf-8")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", help="which; all without any")
    parser.add_argument("--folder", type=Path, default=Path(sys.prefix) / "clients", help="where environments are kept")
    given = parser.parse_args()
    needed, there = requirements(), sorted(path.stem.removeprefix("test_client_") for path in SCRIPTS.glob("test_*.py"))
    if unknown := {*given.clients} - {*there}:
        parser.error(f"no script for {', '.join(sorted(unknown))}; there are {', '.join(there)}.")
    failed = []
    for client in given.clients or there:
        packages = needed.get(client)
        python = Path(sys.executable) if packages is None else environment(given.folder / client, packages)
        run = [python, "-m", "pytest", "-m", "client", f"tests/clients/test_client_{client}.py"]
        print(f"== {client}: {' '.join(packages or ['as the tests'])}", flush=True)
        if subprocess.run(run, cwd=ROOT, env={**os.environ, "GEMMAKIT_CLIENTS": "1"}, check=False).returncode:
            failed.append(client)
    print(f"{len(given.clients or there) - len(failed)} clients passed, {len(failed)} failed", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
