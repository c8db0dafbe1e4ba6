"""Writes the table of docs/quantization.md from benchmarks/results/: python benchmarks/quality_table.py [--check]"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- quality table: made by benchmarks/quality_table.py -->\n", "<!-- end -->"
COLUMNS = ("weights", "perplexity", "a token at a time", "divergence", "same token", "accuracy", "MB")


def line(name: str, row: dict[str, float]) -> str:
    def lost(key: str) -> str:
        return f"{row[key] - 1:+.2%}".replace("%", " %")

    cells = (
        name,
        lost("ratio") if name != "float32" else f"{row['perplexity']:.2f}",
        lost("step_ratio") if name != "float32" else f"{row['step_perplexity']:.2f}",
        f"{1000 * row['kl']:.2f}" if "kl" in row else "",
        f"{row['same_token']:.1%}".replace("%", " %") if "same_token" in row else "",
        f"{row['accuracy']:.1%}".replace("%", " %"),
        f"{row['bytes'] / 1e6:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    result = json.loads((ROOT / "benchmarks/results/quantized_quality.json").read_text())
    about = result["about"]
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [line(name, row) for name, row in result["rows"].items()]
    packages = [
        f"{name} {about[name]}" for name in ("bitsandbytes", "transformers", "llama-cpp-python") if name in about
    ]
    where = f"{about['tokens']:,} tokens ({about['tokens_stepped']:,} of them a token at a time), "
    where += f"{about['questions']} questions; torch {about['torch']}, {', '.join(packages)}"
    return "\n".join([*lines, "", f"{where}; `benchmarks/quantized_quality.py`.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    check = parser.parse_args().check
    page = ROOT / "docs" / "quantization.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    new = before + BEGIN + table() + END + rest.split(END, 1)[1]
    if not check:
        page.write_text(new, encoding="utf-8")
    return int(check and new != text)


if __name__ == "__main__":
    sys.exit(main())
