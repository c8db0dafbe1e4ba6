"""Writes the README's speed tables from benchmarks/results/: python benchmarks/readme_table.py [--check]

A row whose result is not there is left out, and so is a quantized speed without the quality measured beside it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import plain_notes, recipe_table
from rounds import Rounds

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
END = "<!-- end -->"
# Processors by what they have at most, each with a folder of results/, and a table in the README by this name.
SETS = ("amx", "avx2")
PEERS = ("transformers", "llama.cpp", "OpenVINO", "onnxruntime")
HEADINGS = ("", "gemmakit", "of the limit", *PEERS, "quality")
RATES = {"decode_tokens_per_s", "prefill_tokens_per_s"}  # of which more is better

# what a row is called, file in results/, key of the measurement, unit, and the side, where it is not the result's own
ROWS = [
    ("decode, bf16", "cpu_decode_2b_bf16", "decode_tokens_per_s", "tok/s"),
    ("decode, int8", "cpu_decode_2b_int8", "decode_tokens_per_s", "tok/s"),
    ("decode, int4 in groups of 32", "cpu_decode_2b_int4", "decode_tokens_per_s", "tok/s"),
    ("the same, steps in 8 bits", "cpu_decode_2b_int4", "decode_tokens_per_s", "tok/s", "gemmakit int4-a8"),
    ("decode, int4 in groups of 128", "cpu_decode_2b_int4-g128", "decode_tokens_per_s", "tok/s"),
    ("decode, bf16, after 4,096 tokens", "cpu_context_2b", "decode_tokens_per_s_after_4096", "tok/s"),
    ("prefill, 256 tokens, bf16", "cpu_prefill_2b_256", "prefill_tokens_per_s", "tok/s"),
    ("prefill, 256 tokens, int8", "cpu_prefill_2b_256_int8", "prefill_tokens_per_s", "tok/s"),
    ("prefill, 256 tokens, int4", "cpu_prefill_2b_256_int4", "prefill_tokens_per_s", "tok/s"),
    ("prefill, 64 tokens, bf16", "cpu_decode_2b_bf16", "prefill_tokens_per_s", "tok/s"),
    ("prefill, 64 tokens, int8", "cpu_decode_2b_int8", "prefill_tokens_per_s", "tok/s"),
    ("prefill, 64 tokens, int4", "cpu_decode_2b_int4", "prefill_tokens_per_s", "tok/s"),
    ("start to first token, imports included", "cpu_decode_2b_bf16", "first_token_s", "s"),
    ("memory beside the mapped file", "cpu_decode_2b_bf16", "anonymous_gb", "GB"),
    ("decode of the 7B shape, int4", "cpu_decode_7b_int4", "decode_tokens_per_s", "tok/s"),
    ("its peak memory", "cpu_decode_7b_int4", "peak_rss_gb", "GB"),
]


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def cpu_block(folder: str = "") -> str:
    found = [(row, result) for row in ROWS if (result := read(folder + row[1])) is not None]
    rows = [cells for (name, _, *told), result in found if (cells := row_of(name, result, *told))]
    if not rows:
        return "Not measured yet: `python benchmarks/cpu_peers.py` does.\n"
    return "\n".join([*markdown(HEADINGS, rows), "", *under(found), ""])


def row_of(name: str, result: dict[str, Any], key: str, unit: str, side: str = "") -> list[str] | None:
    """The cells of a row; None where the result has no such number, or a quantized one no quality."""
    rounds = Rounds(result["rounds"])
    ours = side or result.get("ours") or next((x for x in rounds.labels() if x.startswith("gemmakit")), "")
    scheme = side.removeprefix("gemmakit ") or result.get("settings", {}).get("quantize")
    quality = result.get("quality", {}).get(scheme, {})
    if key not in (rounds.medians(ours) if ours in rounds.labels() else {}):
        return None
    if scheme is not None and "perplexity_ratio" not in quality:
        return None
    said = f"perplexity {quality['perplexity_ratio']:.3f}x" if scheme is not None else ""
    peers = [beside(rounds, ours, program, key, unit) for program in PEERS]
    share = "" if side else share_of(key, result)
    return [name, f"{rounds.medians(ours)[key]:.3g} {unit}", share, *peers, said]


def beside(rounds: Rounds, ours: str, program: str, key: str, unit: str) -> str:
    """A program's sides: their numbers, and by how much ours is better (the median of the rounds' ratios)."""
    cells: list[str] = []
    labels = [label for label in rounds.labels() if label.startswith(program)]
    for label in labels:
        theirs, ratio = rounds.medians(label), rounds.ratios(ours, label).get(key)
        if key in theirs and ratio:
            kind = label.removeprefix(program).strip()
            fold = f"{max(ratio, 1 / ratio):.2f}x"
            better = f"{ratio:.2f}x" if key in RATES else f"{fold} {'less' if ratio <= 1 else 'more'}"
            cells.append(f"{kind + ' ' if kind else ''}{theirs[key]:.3g} {unit} ({better})")
    return ", ".join(cells)


def share_of(key: str, result: dict[str, Any]) -> str:
    shares = result.get("shares", {})
    if key == "prefill_tokens_per_s" and "prefill_of_matmul" in shares:
        kind = {"bfloat16": "bf16", "float32": "fp32"}.get(shares["matmul_dtype"], shares["matmul_dtype"])
        return f"{shares['prefill_of_matmul']:.0%} of {kind} matmul"
    context = key.partition("_after_")[2] or "0"
    share = shares.get("decode_of_bandwidth", {}).get(context) if key.startswith("decode") else None
    return "" if share is None else f"{share:.0%} of bandwidth"


def under(found: list[tuple[Any, dict[str, Any]]]) -> Iterator[str]:
    """What the table's numbers were measured with, a line a kind of run."""
    dates: dict[str, set[str]] = {}
    for _, result in found:
        torch = (result.get("versions") or next(iter(result["rounds"][0].values())))["torch"]
        dates.setdefault(f"{result['machine']}, {result['threads']} threads, torch {torch}", set()).add(result["date"])
    heads = {r["sides"][r["ours"]]["head_dtype"] for _, r in found if r.get("ours") in r.get("sides", {})}
    head = f" The head is in {' or '.join(sorted(heads))}." if heads else ""
    runs = "; ".join(f"{run}, {' and '.join(sorted(days))}" for run, days in dates.items())
    yield f"Random weights; {runs}.{head}"


def gpu_block() -> str:
    result = read("gpu_recipe")
    if result is None:
        return "Not measured yet on an accelerator: `python benchmarks/gpu.py` does, in under ten minutes.\n"
    table = recipe_table(result)
    return "\n".join([f"{table.title}:", "", *markdown(table.headings, table.rows), "", *plain_notes(table), ""])


def markdown(headings: Any, rows: list[list[str]]) -> list[str]:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(headings)) if i == 0 or any(row[i] not in ("", "-") for row in rows)]
    lines = [[headings[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = new = readme.read_text(encoding="utf-8")
    for name, block in {"cpu": cpu_block(), **{s: cpu_block(f"{s}/") for s in SETS}, "gpu": gpu_block()}.items():
        begin = f"<!-- {name} table: made by benchmarks/readme_table.py -->\n"
        before, rest = new.split(begin)
        new = before + begin + block + END + rest.split(END, 1)[1]
    if not check:
        readme.write_text(new, encoding="utf-8")
    return int(check and new != text)


if __name__ == "__main__":
    sys.exit(main())
