"""The order of processors that the documentation gives is the order that runs."""

import re
from pathlib import Path

from gemmakit.generation import PROCESSOR_ORDER


def test_the_documented_order_of_processors_is_the_one_that_runs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    numbered = re.findall(r"(?<=\| )(\d+) `?(\w+)`?(?= \|)", page)
    order = [name for _, name in sorted(numbered, key=lambda pair: int(pair[0]))]
    assert tuple(order) == PROCESSOR_ORDER
