"""Writes the README's speed table from benchmarks/results/: python benchmarks/readme_table.py [--check]"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- cpu table: made by benchmarks/readme_table.py -->\n", "<!-- end -->"
ROWS = {  # key of a measurement -> what it is called, its unit, and whether more is better
    "decode_tokens_per_s": ("decode", "tokens/s", True),
    "prefill_tokens_per_s": ("prefill, 64 tokens", "tokens/s", True),
    "first_token_s": ("start to first token, imports included", "s", False),
    "anonymous_gb": ("memory beside the mapped file", "GB", False),
}


def table() -> str:
    result = json.loads((ROOT / "benchmarks/results/cpu_decode_2b_bf16.json").read_text())
    lines = ["| | gemmakit | transformers | |", "|---|---|---|---|"]
    for key, (name, unit, more) in ROWS.items():
        sides = ("gemmakit", "transformers")
        ours, theirs = (statistics.median(r[side][key] for r in result["rounds"]) for side in sides)
        ratio = result["median_ratio"][key]
        share = f"{ratio:.2f}x" if more else f"{1 / ratio:.2f}x less"
        lines.append(f"| {name} | {ours:.3g} {unit} | {theirs:.3g} {unit} | {share} |")
    torch = result["rounds"][0]["gemmakit"]["torch"]
    where = f"{result['machine']}, {result['threads']} threads, torch {torch}, {result['date']}"
    return "\n".join([*lines, "", f"Random weights; {where}; `benchmarks/cpu_decode.py`.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    new = before + BEGIN + table() + END + rest.split(END, 1)[1]
    if not check:
        readme.write_text(new, encoding="utf-8")
    return int(check and new != text)


if __name__ == "__main__":
    sys.exit(main())
