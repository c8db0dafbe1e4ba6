"""LoRA on the 2B shape with a few layers, in turn with peft and transformers' Trainer on the CPU.

    python benchmarks/training.py FOLDER [--layers 4] [--steps 4] [--rounds 3] [--out FILE.json]

FOLDER gets random bfloat16 weights and rows of uneven lengths, once. Both sides learn the same rows in the same order,
batches padded to their longest row, weights frozen in bfloat16 and adapters in float32; gemmakit once more with the
rows packed. Tokens are those of rows, not of padding; the first step is not counted. Memory is the most that a process
held, files that it mapped included.
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

from gemmakit.bench.measure import size_config
from gemmakit.cli.env import about, available_cores

OURS, THEIRS, PACKED = "gemmakit", "peft and Trainer", "gemmakit packed"
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
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    make(args.folder, args.layers)
    common = {"steps": args.steps, "threads": args.threads}
    theirs = {
        "model": str(args.folder / "model"),
        "rows": str(in_order(args.folder)),
        "batch_size": BATCH,
        "rank": RANK,
    }
    packs = settings(args.folder, packing=True, batch_size=1, max_length=2 * LONGEST)
    sides = [
        Side(OURS, "gemmakit_tune", {**common, "settings": settings(args.folder)}),
        Side(THEIRS, "peft_trainer", {**common, **theirs, "lr": LR}),
        Side(PACKED, "gemmakit_tune", {**common, "settings": packs}),
    ]
    found = interleave(sides, args.rounds, say=lambda line: print(line, file=sys.stderr))
    result = {
        "what": f"LoRA (rank {RANK}) on the 2B shape with {args.layers} layers and random weights; tokens of rows",
        **about(args.threads), "date": str(date.today()), "batch_size": BATCH, "steps": args.steps,
        "sides": {label: found.medians(label) for label in found.labels()},
        "ratios": {"gemmakit / peft and Trainer": found.ratios(OURS, THEIRS),
                   "gemmakit packed / gemmakit": found.ratios(PACKED, OURS)},
        "rounds": found.rounds, "failed": found.failed, "interrupted": found.interrupted,
    }  # fmt: skip
    finish(result, args.out, ("what", "sides", "ratios", "failed"))


if __name__ == "__main__":
    main()
