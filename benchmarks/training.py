"""LoRA on the 2B shape with a few layers, in turn with peft and transformers' Trainer, litgpt and torchtune on the CPU.

    python benchmarks/training.py FOLDER [--layers 4] [--steps 4] [--rounds 3] [--out FILE.json]
        [--litgpt-python litgpt/bin/python] [--torchtune-python torchtune/bin/python]

FOLDER gets random bfloat16 weights and rows of uneven lengths, once. All sides learn the same rows in the same order,
gemmakit from the weights as they are, the others in bfloat16 too where the processor multiplies it, else in float32:
torch's emulated products would cost them a hundred times the time. They pad a batch to its longest row; gemmakit lets
the rows of a batch stand end to end, and is once more measured with rows packed over batches.
The others have interpreters of their own: `pip install litgpt`, `pip install torchtune torchao==0.10.0`.
Tokens are those of rows, not of padding; the first step is not counted. Memory is the most that a process held, files
that it mapped included; of litgpt and torchtune without what loading took.
"""

import argparse
import json
import random
import sys
from datetime import date
from pathlib import Path

from checkpoints import write_random
from output import finish
from rounds import Side, interleave
from torch import bfloat16

from gemmakit.bench.measure import size_config
from gemmakit.cli.env import about, available_cores
from gemmakit.dtypes import dtype_name
from gemmakit.pytorch.kernels.panels import product_dtype

OURS, THEIRS, PACKED = "gemmakit", "peft and Trainer", "gemmakit packed"
OTHERS = ("litgpt", "torchtune")
RANK, LR, BATCH, LONGEST = 16, 2e-4, 4, 256
WORDS = ("sum", "list", "sort", "reverse", "count", "number", "order", "larger", "which", "what", "item", "letter")


def make(folder: Path, layers: int) -> None:
    """Weights, tokenizer and rows, where they are not there."""
    import gemmakit

    if (folder / "rows.jsonl").exists():
        return
    config = size_config("2b")
    config.num_hidden_layers = layers
    write_random(folder / "model", config)
    gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model()).save_pretrained(folder / "model")
    draw = random.Random(0)
    lengths = [min(LONGEST // 4, max(8, int(draw.lognormvariate(3.2, 0.7)))) for _ in range(256)]
    rows = [{"text": " ".join(draw.choices(WORDS, k=length))} for length in lengths]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def settings(folder: Path, **more: object) -> dict[str, object]:
    data = str(folder / "rows.jsonl")
    return {"model": str(folder / "model"), "data": data, "rank": RANK, "lr": LR, "batch_size": BATCH, **more}


def in_order(folder: Path) -> Path:
    """The rows as ids and labels, in the order in which gemmakit tune takes them."""
    import gemmakit
    from gemmakit.tune.batches import Order
    from gemmakit.tune.data import read
    from gemmakit.tune.examples import Encoder

    tokenizer = gemmakit.AutoTokenizer.from_pretrained(folder / "model")
    made = Encoder(tokenizer, 8192).examples(read(folder / "rows.jsonl", {}).rows)
    order = Order(len(made), BATCH, 1, 0)
    units = [unit for number in range(order.steps_per_epoch) for part in order.step(number) for unit in part]
    rows = [
        [made[u].ids, [i if on else -100 for i, on in zip(made[u].ids, made[u].learnt, strict=True)]] for u in units
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="2 or more: the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    for name in OTHERS:
        parser.add_argument(f"--{name}-python", help=f"the interpreter of an environment with {name}, to measure it")
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"), default=dtype_name(product_dtype(bfloat16)))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}; it must be at least 2, for the first is not counted")
    make(args.folder, args.layers)
    common = {"steps": args.steps, "threads": args.threads}
    theirs = {
        "model": str(args.folder / "model"),
        "rows": str(in_order(args.folder)),
        "batch_size": BATCH,
        "rank": RANK,
        "lr": LR,
        "dtype": args.peer_dtype,
    }
    pythons = {name: getattr(args, f"{name}_python") for name in OTHERS}
    peers = {name: python for name, python in pythons.items() if python}
    packs = settings(args.folder, packing=True, batch_size=1, max_length=2 * LONGEST)
    sides = [
        Side(OURS, "gemmakit_tune", {**common, "settings": settings(args.folder)}),
        Side(THEIRS, "peft_trainer", {**common, **theirs}),
        *(Side(name, f"{name}_lora", {**common, **theirs}, python) for name, python in peers.items()),
        Side(PACKED, "gemmakit_tune", {**common, "settings": packs}),
    ]
    found = interleave(sides, args.rounds, say=lambda line: print(line, file=sys.stderr))
    result = {
        "what": f"LoRA (rank {RANK}) on the 2B shape with {args.layers} layers and random weights; tokens of rows",
        **about(args.threads), "date": str(date.today()), "batch_size": BATCH, "steps": args.steps,
        "sides": {label: found.medians(label) for label in found.labels()},
        "ratios": {**{f"{OURS} / {peer}": found.ratios(OURS, peer) for peer in (THEIRS, *peers)},
                   f"{PACKED} / {OURS}": found.ratios(PACKED, OURS)},
        "rounds": found.rounds, "failed": found.failed, "interrupted": found.interrupted,
    }  # fmt: skip
    finish(result, args.out, ("what", "sides", "ratios", "failed"))


if __name__ == "__main__":
    main()
