"""Load, first token, prefill and greedy decode on the CPU, gemmakit and transformers in turn on one checkpoint.

    python benchmarks/cpu_decode.py CHECKPOINT [--rounds 3] [--dtype bfloat16] [--out benchmarks/results/FILE.json]

Every measurement is a fresh process; the sides alternate, and the ratio of each round is reported with its median.
`--side NAME` runs one measurement and prints it as JSON. transformers has to be installed for its side.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(args: argparse.Namespace) -> dict:
    """One side, in this process. Times in seconds, memory in bytes."""
    started = time.perf_counter()
    import torch

    if args.side == "gemmakit":
        from gemmakit import GemmaForCausalLM, __version__
    else:
        from transformers import GemmaForCausalLM, __version__
    torch.set_num_threads(args.threads)
    imported = time.perf_counter() - started
    bare = anonymous_bytes()

    started = time.perf_counter()
    model = GemmaForCausalLM.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).eval()
    loaded = time.perf_counter() - started
    prompt = torch.randint(5, model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    prompt[0, 0] = 2

    def run(new: int) -> float:
        t = time.perf_counter()
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - t

    with torch.inference_mode():
        first = run(1)
        run(args.new + 1)
        prefill = statistics.median(run(1) for _ in range(args.repeats))
        total = statistics.median(run(args.new + 1) for _ in range(args.repeats))
    return {
        "side": f"{args.side} {__version__}",
        "torch": torch.__version__,
        "import_s": round(imported, 3),
        "load_s": round(loaded, 3),
        "first_token_s": round(imported + loaded + first, 3),
        "prefill_tokens_per_s": round(args.prompt / prefill, 2),
        "decode_tokens_per_s": round(args.new / (total - prefill), 3),
        "anonymous_gb": round((anonymous_bytes() - bare) / 1e9, 3),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def compare(args: argparse.Namespace) -> dict:
    """Both sides in turn; the ratios are gemmakit's over transformers', so above 1 is better for the rates."""
    rounds = []
    for number in range(args.rounds):
        sides = {}
        for side in ("gemmakit", "transformers"):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            sides[side] = json.loads(done.stdout.splitlines()[-1])
            print(f"round {number + 1}: {json.dumps(sides[side])}", flush=True)
        rounds.append(sides)
    keys = ("import_s", "load_s", "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "anonymous_gb")
    ratios = {
        k: round(statistics.median(r["gemmakit"][k] / max(r["transformers"][k], 1e-9) for r in rounds), 3) for k in keys
    }
    return {
        "what": "CPU load, prefill and greedy decode; head in the weights' dtype; random weights",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {cpu_name()}",
        "threads": args.threads,
        "dtype": args.dtype,
        "prompt": args.prompt,
        "new": args.new,
        "median_ratio": ratios,
        "rounds": rounds,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["gemmakit", "transformers"])
    args = parser.parse_args()
    result = measure(args) if args.side else compare(args)
    print(json.dumps(result) if args.side else json.dumps(result["median_ratio"], indent=1))
    if args.out and not args.side:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
