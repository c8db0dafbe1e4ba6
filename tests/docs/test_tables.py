"""Tables in the documentation say what the code does and what was measured."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemmakit.cli import main
from gemmakit.pytorch.decode.processors import PROCESSORS

ROOT = Path(__file__).resolve().parents[2]


def test_the_documented_order_of_processors_is_the_one_that_runs():
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    numbered = re.findall(r"(?<=\| )(\d+) `?(\w+)`?(?= \|)", page)
    order = [name for _, name in sorted(numbered, key=lambda pair: int(pair[0]))]
    assert tuple(order) == tuple(PROCESSORS)


def test_the_table_of_serve_s_flags_is_what_its_help_says(capsys):
    """Every flag, its placeholder, and its default where there is one."""
    assert main(["serve", "--help"]) == 0
    told = capsys.readouterr().out.partition("Options:")[2]
    options = re.findall(r"^  (--[^ ].*?)(?:  |$)(.*?)(?=^  -)", told, re.MULTILINE | re.DOTALL)
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", page, re.MULTILINE)
    documented = {flag: left_out for flags, left_out in rows for flag in re.findall("`(.*?)`", flags)}
    assert {flag for name, _ in options for flag in name.split(" / ")} == set(documented)
    for name, text in options:
        default = re.search(r"default: (.*?)[];]", " ".join(text.split()))
        if default:
            assert f"`{default[1]}`" in documented[name]


def test_the_speed_table_in_the_readme_is_the_measured_one():
    script = ROOT / "benchmarks" / "readme_table.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """readme_table.py with results of its own."""
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)

    def write(name, **changes):
        ours, theirs = ({"decode_tokens_per_s": rate, "head_dtype": "int8"} for rate in (4.0, 2.0))
        result = {
            "machine": "a machine", "threads": 2, "versions": {"torch": "2"}, "date": "today", "ours": "gemmakit int4",
            "settings": {"quantize": "int4"}, "quality": {"int4": {"perplexity_ratio": 1.0123}},
            "shares": {"decode_of_bandwidth": {"0": 0.7}}, "sides": {"gemmakit int4": ours},
            "rounds": [{"gemmakit int4": ours, "llama.cpp Q4_0": theirs}],
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, **changes}))

    module.write = write
    return module


def test_results_that_are_not_there_leave_no_row(tables):
    assert tables.cpu_block().startswith("Not measured yet")
    assert tables.gpu_block().startswith("Not measured yet")


def test_a_row_has_the_share_the_ratio_and_the_quality(tables):
    tables.write("cpu_decode_2b_int4")
    lines = tables.cpu_block().splitlines()
    assert lines[0] == "| | gemmakit | of the limit | llama.cpp | quality |"
    cells = "4 tok/s | 70% of bandwidth | Q4_0 2 tok/s (2.00x) | perplexity 1.012x"
    assert lines[2] == f"| decode, int4 in groups of 32 | {cells} |"
    assert "The head is in int8." in lines[-1]


def test_a_quantized_speed_without_quality_is_left_out(tables):
    tables.write("cpu_decode_2b_int4", quality={"int4": {"error": "no demo model"}})
    assert "decode" not in tables.cpu_block()


def test_the_quality_table_of_quantization_is_the_measured_one():
    script = ROOT / "benchmarks" / "quality_table.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
