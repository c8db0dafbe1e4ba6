"""Greedy decode of the Flax backend on the CPU, in turn with this package's PyTorch and with the FlaxGemma that was.

    python benchmarks/flax_decode.py FOLDER --make --layers 4
    python benchmarks/flax_decode.py FOLDER --old-python old/bin/python [--rounds 3] [--out FILE.json]

`--make` writes random float32 weights of the 2B width with so many layers. The old side is transformers 4.46.3, which
needs an environment of its own (see scripts/make_flax_fixtures.py); its generate() runs inside jax.jit, the way its
documentation says. Every measurement is a fresh process; the sides alternate, and each round's ratio is reported with
the median. Compile time is apart: what the first call of a shape takes longer than the next ones.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIDES = ("flax", "pytorch", "old_flax")


def prompt_of(args, vocabulary):
    import numpy as np

    ids = np.random.default_rng(0).integers(5, vocabulary, (1, args.prompt))
    ids[0, 0] = 2
    return ids


def flax_runner(args):
    """run(new tokens), which returns when they are there; the versions."""
    import jax

    from gemmakit import FlaxGemmaForCausalLM, __version__

    model = FlaxGemmaForCausalLM.from_pretrained(args.checkpoint)
    ids = prompt_of(args, model.config.vocab_size)

    def run(new):
        # A number of new tokens that needs another bucket would compile anew: both lengths are of one bucket.
        return model.generate(ids, max_new_tokens=new, eos_token_id=None, do_sample=False).sequences

    return run, f"gemmakit {__version__} flax, jax {jax.__version__}"


def pytorch_runner(args):
    import torch

    from gemmakit import GemmaForCausalLM, __version__

    torch.set_num_threads(args.threads)
    model = GemmaForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    ids = torch.tensor(prompt_of(args, model.config.vocab_size))

    def run(new):
        return model.generate(ids, max_new_tokens=new, eos_token_id=None, do_sample=False)

    return run, f"gemmakit {__version__} pytorch, torch {torch.__version__}"


def old_flax_runner(args):
    import jax
    import transformers

    model = transformers.FlaxGemmaForCausalLM.from_pretrained(args.checkpoint, from_pt=True)
    ids = prompt_of(args, model.config.vocab_size)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    compiled = jax.jit(
        lambda params, ids, new: model.generate(ids, params=params, max_new_tokens=new, **settings).sequences,
        static_argnums=2,
    )

    def run(new):
        return compiled(model.params, ids, new).block_until_ready()

    return run, f"transformers {transformers.__version__}, jax {jax.__version__}"


def measure(args):
    """One side, in this process. Times in seconds."""
    started = time.perf_counter()
    run, versions = {"flax": flax_runner, "pytorch": pytorch_runner, "old_flax": old_flax_runner}[args.side](args)
    loaded = time.perf_counter() - started

    def timed(new):
        t = time.perf_counter()
        run(new)
        return time.perf_counter() - t

    first = {new: timed(new) for new in (args.few, args.many)}
    again = {new: statistics.median(timed(new) for _ in range(args.repeats)) for new in first}
    a_token = (again[args.many] - again[args.few]) / (args.many - args.few)
    return {
        "side": versions,
        "load_s": round(loaded, 2),
        "compile_s": round(max(0.0, sum(first[new] - again[new] for new in first)), 2),
        "first_tokens_s": round(again[args.few], 3),
        "tokens_per_s": round(1 / a_token, 3),
    }


def command_of(args, side):
    """The command that measures a side; the old one runs this very file with its own interpreter."""
    python = args.old_python if side == "old_flax" else sys.executable
    passed = {"--threads": args.threads, "--prompt": args.prompt, "--few": args.few, "--many": args.many,
              "--repeats": args.repeats, "--side": side}  # fmt: skip
    return [python, __file__, str(args.checkpoint), *(str(x) for pair in passed.items() for x in pair)]


def compare(args):
    """The sides in turn; the ratios are of tokens/s, the Flax backend's over the other's."""
    sides = [s for s in SIDES if s in args.sides and (s != "old_flax" or args.old_python)]
    rounds = []
    for number in range(args.rounds):
        found = {}
        for side in sides:
            done = subprocess.run(command_of(args, side), capture_output=True, text=True, env=os.environ, check=False)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
            found[side] = json.loads(done.stdout.splitlines()[-1])
            print(f"round {number + 1}, {side}: {json.dumps(found[side])}", flush=True)
        rounds.append(found)
    rates = {side: [found[side]["tokens_per_s"] for found in rounds] for side in sides}
    ratios = {
        f"flax over {side}": round(statistics.median(a / b for a, b in zip(rates["flax"], rates[side], strict=True)), 3)
        for side in sides
        if side != "flax"
    }
    config = json.loads((args.checkpoint / "config.json").read_text())
    width = {k: config[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")}
    return {
        "what": "greedy decode on the CPU, float32 weights and head, batch 1, random weights, after compilation",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "model": width,
        "bytes_a_token": bytes_a_token(config),
        "prompt": args.prompt,
        "new": [args.few, args.many],
        "median_ratio": ratios,
        "compile_s": {side: statistics.median(r[side]["compile_s"] for r in rounds) for side in sides},
        "tokens_per_s": {side: statistics.median(rates[side]) for side in sides},
        "rounds": rounds,
    }


def bytes_a_token(config):
    """Weights read for one token in float32: every projection, and the tied head."""
    D, F = config["hidden_size"], config["intermediate_size"]
    N, K, H = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    layer = D * H * (2 * N + 2 * K) + 3 * D * F
    return 4 * (config["num_hidden_layers"] * layer + config["vocab_size"] * D)


def cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def make(args):
    import torch

    from gemmakit import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    config = GemmaConfig.preset("2b", num_hidden_layers=args.layers, vocab_size=args.vocab)
    GemmaForCausalLM(config).save_pretrained(args.checkpoint)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--make", action="store_true", help="write the checkpoint instead of measuring")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=256000)
    parser.add_argument("--threads", type=int, default=2, help="of torch; JAX takes all cores")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--few", type=int, default=17, help="new tokens of the shorter call")
    parser.add_argument("--many", type=int, default=24, help="of the longer; the difference is what is timed")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--old-python", help="interpreter of an environment with transformers 4.46.3")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES)
    args = parser.parse_args()
    if args.make:
        return make(args)
    if args.side:
        return print(json.dumps(measure(args)))
    result = compare(args)
    print(json.dumps({k: result[k] for k in ("median_ratio", "tokens_per_s", "compile_s")}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
