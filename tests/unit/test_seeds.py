"""Draws of a test follow from its name and GEMMAKIT_TEST_SEED alone (tests/conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
FILE = """
import random

import pytest

AT_IMPORT = random.random()


@pytest.fixture(scope="module")
def shared():
    return random.random()


def test_before(shared):
    pass


def test_draws(shared):
    print("drawn", AT_IMPORT, shared, random.random())
"""


def drawn(folder, *names, seed="0"):
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (folder / "test_file.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    done = subprocess.run(
        [*command, *(f"{folder}/test_file.py{name}" for name in names)],
        env=os.environ | {"GEMMAKIT_TEST_SEED": seed}, capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    return next(line for line in done.stdout.splitlines() if "drawn" in line)


def test_a_tests_draws_are_its_own_whatever_ran_before(tmp_path):
    together = drawn(tmp_path, "").lstrip(".")
    assert drawn(tmp_path, "::test_draws") == together
    assert drawn(tmp_path, "::test_draws", seed="1") != together
