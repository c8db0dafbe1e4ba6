"""Virtual environments for other people's programs, listed in a file: one a line, "NAME: what pip installs".

A ";" parts the calls of pip, which take place in that order; each may have options of its own (--no-deps).
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

Calls = Sequence[Sequence[str]]


def listed(file: Path) -> dict[str, Calls]:
    """Name -> the arguments of each call of pip."""
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(":", 1) for line in lines if line and not line.startswith("#"))
    return {name: [call.split() for call in calls.split(";")] for name, calls in pairs}


def environment(folder: Path, calls: Calls, beneath: bool = False, base: str = sys.executable) -> Path:
    """The Python of a virtual environment with these packages; an existing one is kept while they are the same.

    beneath: it sees the packages of the environment that runs this too, behind its own. base: the Python it is made of.
    """
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    text = "\n".join(" ".join(call) for call in calls)
    if done.exists() and done.read_text(encoding="utf-8") == text:
        return python
    subprocess.run([base, "-m", "venv", "--clear", *["--without-pip"] * beneath, folder], check=True)
    if beneath:
        site = next((folder / "lib").glob("python*/site-packages"))
        line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (site / "beneath.pth").write_text(line, encoding="utf-8")
    for call in calls:
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *call], check=True)
    done.write_text(text, encoding="utf-8")
    return python
