"""docs/structures.md names files and functions: they are there, under these names."""

import re
from pathlib import Path

import pytest

from gemmakit.pytorch.decode.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "structures.md").read_text()
FILE = r"gemmakit/[\w/]+\.(?:py|cpp)"
# "`name` (file)", "`name` in file", and rows "| file | `name` |"
NAMED = [
    *re.findall(rf"`([\w.]+)(?:\(\))?`,?\s+(?:\(|in )({FILE})", TEXT),
    *[(name, file) for file, name in re.findall(rf"\| ({FILE}) \| `(\w+)`", TEXT)],
]


def test_the_page_stays_short():
    assert len(TEXT.splitlines()) < 120


@pytest.mark.parametrize("file", sorted(set(re.findall(FILE, TEXT))))
def test_every_file_of_the_page_is_there(file):
    assert (ROOT / file).is_file()


@pytest.mark.parametrize(("name", "file"), sorted(set(NAMED)))
def test_every_function_of_the_page_is_in_its_file(name, file):
    source, last = (ROOT / file).read_text(), name.rpartition(".")[2]
    assert re.search(rf"^\s*(async )?(def|class) {last}\b|^extern .*\b{last}\b", source, re.MULTILINE), (
        f"no {name} in {file}"
    )


def test_the_page_names_enough_to_be_worth_looking_up():
    assert len(NAMED) > 20


def test_the_readme_counts_the_strategies_there_are():
    number = {8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve"}[len(STRATEGIES)]
    assert f"{number} decoding strategies" in (ROOT / "README.md").read_text()
