"""Every code block of the README and of docs/ runs: a page's python in one namespace, its bash line by line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What sets up the machine, needs a terminal or a download is not repeated here; other tests and `make demo` run it.
NOT_HERE = ("make ", "pip ", "git ", "cd ", "gemmakit chat", "python -m venv")


def blocks(page, kind):
    return [code for language, code in BLOCK.findall(page.read_text(encoding="utf-8")) if language == kind]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python_on_the_page_runs(page, tmp_path):
    program = "\n\n".join(blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stderr}\n--- in\n{program}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=name)
def test_commands_on_the_page_run(page, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in "".join(blocks(page, "bash")).splitlines():
        command = line.removeprefix("$ ").partition("  #")[0].strip()
        if not command or command.startswith(NOT_HERE):
            continue
        env = {**os.environ, "PATH": path}
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}: {done.stderr}"
