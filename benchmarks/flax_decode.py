"""Greedy decode of the Flax backend on the CPU, in turn with this package's PyTorch and with the FlaxGemma that was.

    python benchmarks/flax_decode.py FOLDER --make --layers 4
    python benchmarks/flax_decode.py FOLDER --old-python old/bin/python [--rounds 3] [--out FILE.json]

`--make` writes random float32 weights of the 2B width with so many layers. The old side is transformers 4.46.3, which
needs an environment of its own (see scripts/make_flax_fixtures.py); its generate() runs inside jax.jit, the way its
documentation says. Every measurement is a fresh process; the sides alternate, and each round's ratio is reported with
the median. Compile time is apart: what the first call of a shape takes longer than the next ones.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from output import finish

SIDES = ("flax", "pytorch", "old_flax")


class Command(NamedTuple):
    label: str
    command: list[str]


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
    # Here and not above: the old side's interpreter, which runs this file too, has no gemmakit.
    from rounds import interleave

    from gemmakit import GemmaConfig
    from gemmakit.bench.measure import linear_weights
    from gemmakit.cli.env import about

    sides = [Command(s, command_of(args, s)) for s in SIDES if s in args.sides and (s != "old_flax" or args.old_python)]
    done = interleave(sides, args.rounds, say=lambda message: print(message, file=sys.stderr))
    if done.failed:
        sys.exit("; ".join(f"{side} failed: {why}" for side, why in done.failed.items()))
    medians = {side: done.medians(side) for side in done.labels()}
    ratios = {f"flax over {side}": done.ratios("flax", side)["tokens_per_s"] for side in medians if side != "flax"}
    config = GemmaConfig.from_pretrained(args.checkpoint)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    return {
        "what": "greedy decode on the CPU, float32 weights and head, batch 1, random weights, after compilation",
        **about(args.threads, "transformers"),
        "model": {name: getattr(config, name) for name in names},
        "bytes_a_token": 4 * (linear_weights(config) + config.vocab_size * config.hidden_size),
        "prompt": args.prompt,
        "new": [args.few, args.many],
        "median_ratio": ratios,
        "compile_s": {side: found["compile_s"] for side, found in medians.items()},
        "tokens_per_s": {side: found["tokens_per_s"] for side, found in medians.items()},
        "rounds": done.rounds,
    }


def make(args):
    from checkpoints import write_random

    from gemmakit.bench.measure import size_config

    write_random(args.checkpoint, size_config("2b", num_hidden_layers=args.layers, vocab_size=args.vocab), "float32")


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
    return finish(result, args.out, ("median_ratio", "tokens_per_s", "compile_s"))


if __name__ == "__main__":
    main()
