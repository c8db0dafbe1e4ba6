"""Rows that decode side by side: what a step of several costs beside one, in turn with llama.cpp's low-level batch and
OpenVINO's continuous batching (`make peers` installs them).

    python benchmarks/rows.py [--kind bf16 int8 int4] [--rows 1 2 4 8 16] [--layers 18]

Greedy steps of the batch engine, same bits whatever else runs, on random weights of the 2B shape or of its first
layers; tokens/s of all rows together. What the others read is written once and kept beside the checkpoint. The result
is written after every measurement: Ctrl-C keeps what there is.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import peer_models
from checkpoints import cached_random, fields
from compare import if_possible, llamacpp_side, written_side
from peers import interpreter
from rounds import Rounds, Side, interleave

from gemmakit.cli.env import about, available_cores

RESULT = Path(__file__).parent / "results" / "cpu_rows_2b.json"
# Ours, and llama.cpp's of as many bits: Q8_0 and Q4_0 have a scale for 32 weights.
KINDS = {"bf16": (None, "BF16"), "int8": ("int8", "Q8_0"), "int4": ("int4", "Q4_0")}


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def sides(kind: str, args: argparse.Namespace) -> list[Side]:
    """Ours, and those of the others that are installed."""
    quantize, gguf = KINDS[kind]
    spec = {"part": "rows", **{name: getattr(args, name) for name in ("rows", "threads", "prompt", "new")}}
    config = {**fields(args.size), "num_hidden_layers": args.layers}
    chosen = {"config": config, "dtype": "bfloat16", "device": "cpu", "quantize": quantize}
    found = [Side("gemmakit", "gemmakit_side", {**spec, **chosen})]

    def llamacpp() -> Side:
        python = args.llama_python or interpreter("llama.cpp")
        checkpoint = cached_random(args.size, say=note, layers=args.layers)
        return llamacpp_side(spec, peer_models.gguf(checkpoint, gguf, say=note), python, label=gguf)

    def openvino() -> Side:
        interpreter("openvino")
        checkpoint = cached_random(args.size, say=note, layers=args.layers)
        return written_side("openvino", spec, checkpoint, peer_models.kind_of(quantize), note)

    return found + [side for make in (llamacpp, openvino) if (side := if_possible(make.__name__, make, note))]


def summary(found: Rounds, rows: list[int]) -> dict[str, Any]:
    """By side the medians, and what a step of so many rows takes beside one of one row; ratios of ours to theirs."""
    keys = {count: f"tokens_per_s_{count}" for count in rows}
    kept = ("side", "instruction_set", "batch_invariant", *keys.values())
    each = [{side: {k: v for k, v in got.items() if k in kept} for side, got in r.items()} for r in found.rounds]
    out: dict[str, Any] = {"rounds": each, "failed": found.failed}
    for label in found.labels():
        medians = found.medians(label)
        rates = {count: medians[key] for count, key in keys.items() if key in medians}
        out[label] = {"tokens_per_s": rates}
        if 1 in rates:
            out[label]["step_over_one_row"] = {c: round(c * rates[1] / rate, 3) for c, rate in rates.items()}
    ours, *others = found.labels()
    for label in others:
        ratios = found.ratios(ours, label)
        out[label]["ours_over_theirs"] = {count: ratios[key] for count, key in keys.items() if key in ratios}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--size", default="2b", help="the shape: 2b, or tiny for a trial")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each row's prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of each row")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=3, help="processes a side")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python, instead of that of make peers")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = {"what": f"tokens/s of rows that decode side by side, {args.size} shape, {args.layers} layers",
              **about(args.threads), "layers": args.layers}  # fmt: skip
    for kind in args.kind:

        def keep(found: Rounds, kind: str = kind) -> None:
            result[kind] = summary(found, args.rows)
            args.out.write_text(json.dumps(result, indent=1) + "\n")

        interleave(sides(kind, args), args.rounds, say=note, keep=keep)
        for label in result[kind]:
            if label not in ("rounds", "failed"):
                print(kind, label, json.dumps(result[kind][label]), flush=True)


if __name__ == "__main__":
    main()
