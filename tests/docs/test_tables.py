"""Tables in the documentation say what the code does and what was measured."""

import re
import subprocess
import sys
from pathlib import Path

from gemmakit.generation import PROCESSOR_ORDER

ROOT = Path(__file__).resolve().parents[2]


def test_the_documented_order_of_processors_is_the_one_that_runs():
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    numbered = re.findall(r"(?<=\| )(\d+) `?(\w+)`?(?= \|)", page)
    order = [name for _, name in sorted(numbered, key=lambda pair: int(pair[0]))]
    assert tuple(order) == PROCESSOR_ORDER


def test_the_speed_table_in_the_readme_is_the_measured_one():
    script = ROOT / "benchmarks" / "readme_table.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
