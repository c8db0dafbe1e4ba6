"""What one core's products reach: bfloat16 and unrounded int8 over a prompt, ours and torch's, and a few rows of codes.

    python benchmarks/products.py [--seconds 0.5] [--isa avx512] [--out results.json]

Each is the best of as many calls as fit the time, on weights that stay in the second cache: what the arithmetic allows,
not the memory. `linear.PAIR_ROWS` says up to how many rows ours runs where results may depend on the row count, and
`cpu.multiplies_floats` on which processors it is the only one. Torch's float32 product has its weight ready.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gemmakit.native
from gemmakit.cli.env import about
from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.quantize.rounding import quantize

RESULT = Path(__file__).parent / "results" / "cpu_products.json"
# (rows of x, outputs, inputs): as many outputs as a share of the 2B shape's weights that a core takes at a time.
PROMPT = [(192, 192, 2048), (192, 96, 8192), (64, 192, 2048), (32, 192, 2048), (16, 192, 2048), (8, 192, 2048)]
FEW = (1, 2, 4, 8, 16)
OUT, IN = 128, 2048


def best(call: Callable[[], object], seconds: float) -> float:
    """The shortest of its runs, in seconds."""
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls to each product")
    parser.add_argument("--isa", help="the native kernels' instruction set; the best if left out")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not gemmakit.native.use_instruction_set(args.isa):
        parser.error(f"the instruction set {args.isa} was not compiled or does not run here")
    result = {"what": "the rates of one core's products, weights in its second cache", **about(1),
              "instruction_set": cpu.instruction_set(), "multiplies_pairs": cpu.multiplies_pairs(),
              "multiplies_floats": cpu.multiplies_floats()}  # fmt: skip
    plain_rates: dict[str, dict[str, float]] = {}
    unrounded_rates: dict[str, dict[str, float]] = {}
    result |= {"bf16_gflop_per_s": plain_rates, "int8_unrounded_gflop_per_s": unrounded_rates}
    for M, O, I in PROMPT:
        x, w = torch.randn(M, I).bfloat16(), torch.randn(O, I).bfloat16()
        wide, wide_w, packed = x.float(), w.float(), quantize(w, 8, None)
        plain, codes = [cpu.matrix(w)], [cpu.matrix(packed, None, 32)]
        calls = {"bf16 gemmakit": lambda x=x, m=plain: cpu.project(x, m), "bf16 torch": lambda x=x, w=w: x @ w.T,
                 "int8 gemmakit": lambda x=x, m=codes: cpu.project(x, m),
                 "int8 torch float32": lambda x=wide, w=wide_w: x @ w.T}  # fmt: skip
        for name, call in calls.items():
            kind, who = name.split(maxsplit=1)
            rate = round(2e-9 * M * O * I / best(call, args.seconds), 1)
            rates = plain_rates if kind == "bf16" else unrounded_rates
            rates.setdefault(f"{M} rows, {O} x {I}", {})[who] = rate
    for bits, group in ((8, None), (4, 32)):
        packed = quantize(torch.randn(OUT, IN), bits, group)
        m = [cpu.matrix(packed, None, 8)]
        times = result[f"int{bits}_us"] = {}
        for rows in FEW:
            x = torch.randn(rows, IN).bfloat16()
            times[rows] = round(1e6 * best(lambda x=x, m=m: cpu.project(x, m), args.seconds), 1)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: found for name, found in result.items() if name != "versions"}, indent=1))


if __name__ == "__main__":
    main()
