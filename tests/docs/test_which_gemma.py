"""The table of sizes says what the formulas say, and names every size that there is."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

from gemmakit import GemmaConfig
from gemmakit.checkpoint.inspect import memory
from gemmakit.checkpoint.layout import tensor_shapes
from gemmakit.family import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "which-gemma.md"
GB = 1e9


def figures(size: str) -> list[float]:
    config = GemmaConfig.preset(size)
    longest, needs = config.max_position_embeddings, memory(config)
    weights = [needs[name]["weights"] / GB for name in ("bfloat16", "int8", "int4 g32")]
    short, long = (2 * config.cache_size(tokens) / GB for tokens in (min(8192, longest), longest))
    return [sum(map(prod, tensor_shapes(config).values())) / GB, *weights, short, longest, long]


def test_the_table_of_sizes_is_what_shapes_and_windows_give():
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [size for size, _ in rows] == list(PRESETS)
    for size, said in rows:
        numbers = [float(cell.replace(",", "")) for cell in said.split(" | ")]
        assert numbers == [round(number, 2) for number in figures(size)], size
