"""Two checkouts of gemmakit in turn on the CPU: decode and prefill of the 2B shape in bf16, int8 and int4.

    python benchmarks/two_commits.py OTHER_CHECKOUT [--rounds 5] [--out results.json]

Each measurement is a process of its own in one checkout; every round measures both, the order changing from round to
round, so that what else the machine does falls on both. Prints the median of the rounds' ratios, this checkout's rate
over the other's. Only public names are used. Weights are random and written once (benchmarks/ can be deleted from the
user's cache afterwards); native kernels must have been built in both checkouts.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SHAPE = dict(hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
             num_key_value_heads=1, dtype="bfloat16")  # fmt: skip
WRITE = """
import sys, torch, gemmakit
from pathlib import Path
folder, shape = Path(sys.argv[1]), eval(sys.argv[2])
torch.set_default_dtype(torch.bfloat16)
if not (folder / "bf16" / "config.json").exists():
    gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**shape)).save_pretrained(folder / "bf16")
for scheme in ("int8", "int4"):
    if not (folder / scheme / "config.json").exists():
        gemmakit.quantize_checkpoint(folder / "bf16", folder / scheme, scheme)
"""
MEASURE = """
import json, sys, time, torch, gemmakit
model = gemmakit.GemmaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
torch.set_num_threads(int(sys.argv[2]))
prompt, new = int(sys.argv[3]), int(sys.argv[4])
ids = torch.tensor([[2, *[(7 * i * i + 3 * i) % 9000 + 5 for i in range(prompt - 1)]]])

# A commit may not know the setting; the others would take several tokens a step where text repeats.
own = {"speculate": False} if hasattr(model.generation_config, "speculate") else {}

def seconds(new):
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=new, eos_token_id=[], do_sample=False, **own)
    return time.perf_counter() - start

seconds(3)
first = [seconds(1) for _ in range(3)]
whole = [seconds(new + 1) for _ in range(3)] if new else []
print(json.dumps({"prefill": prompt / min(first), "decode": new / (min(whole) - min(first)) if new else None}))
"""
PARTS = {"decode": (8, 24), "prefill": (256, 0)}


def run(checkout: Path, code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"the measurement failed in {checkout}")
    return done.stdout


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--schemes", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "gemmakit" / "two_commits")
    parser.add_argument("--out", type=Path, help="where the rates go as JSON")
    args = parser.parse_args()
    run(args.other.resolve(), WRITE, args.weights, SHAPE)
    sides = {"here": HERE, "other": args.other.resolve()}
    result: dict = {"processor": processor(), "threads": args.threads, "date": str(date.today()), "rates": {}}
    for scheme in args.schemes:
        for part in args.parts:
            prompt, new = PARTS[part]
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for i in range(args.rounds):
                for name in sorted(sides, reverse=bool(i % 2)):
                    found = run(sides[name], MEASURE, args.weights / scheme, args.threads, prompt, new)
                    rates[name].append(json.loads(found)[part])
            ratios = [a / b for a, b in zip(rates["here"], rates["other"], strict=True)]
            result["rates"][f"{part}, {scheme}"] = {**rates, "ratio": statistics.median(ratios)}
            here, other = (statistics.median(rates[name]) for name in ("here", "other"))
            each = ", ".join(f"{r:.3f}" for r in ratios)
            print(f"{part}, {scheme}: {here:.2f} against {other:.2f} tok/s, {statistics.median(ratios):.3f}x ({each})")
            sys.stdout.flush()
            if args.out is not None:
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
