"""What takes minutes begins first (tests/conftest.py)."""

import runpy
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
MINUTES = runpy.run_path(str(TESTS / "conftest.py"))["MINUTES"]


def collected(folder):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "--rootdir", folder]
    done = subprocess.run([*command, folder], capture_output=True, text=True, check=True, cwd=folder)
    return [line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line]


def test_files_of_minutes_are_collected_first_the_longest_before_the_others(tmp_path):
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    for name in ("test_a.py", *MINUTES, "zz/test_z.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("def test_it(): pass\n")
    longest = sorted(MINUTES, key=MINUTES.__getitem__, reverse=True)
    assert collected(tmp_path) == [*longest, "test_a.py", "zz/test_z.py"]


def test_the_files_of_minutes_are_there():
    assert all((TESTS / name).is_file() for name in MINUTES)
