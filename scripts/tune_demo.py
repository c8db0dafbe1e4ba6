"""What `gemmakit tune` is shown by: a task that the demo model cannot do, as data, and what it forgot of the others.

    python scripts/tune_demo.py data DIR            writes DIR/train.jsonl and DIR/valid.jsonl
    python scripts/tune_demo.py measure [ADAPTER]   accuracy of every task of scripts/demo_tasks.py, with and without

The task is the largest of three to five numbers. A list is held out by a hash of its numbers, in any order. Three rows
of five are of the old tasks, drawn from their training side: without them an adapter forgets, first of all what is most
like the new task, which is drawn more often.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import demo_tasks

WORDINGS = ("Which is the largest: {}?", "What is the largest of {}?", "Largest of {}?", "Find the largest number: {}")
NEW, OLD, VALID = 2400, 3600, 200
# What the demo model claims, and how often each is drawn.
REHEARSED = {"sum": 1, "difference": 1, "compare": 3, "sort": 3, "number": 1, "reverse": 1, "decline": 1}
MEASURED_ROWS = 800  # where 98 % are right, a difference is off by 0.7 points as a rule


MEASURED = [task for task in demo_tasks.MEASURED if task != "count"]


def largest(rng: random.Random, held: bool) -> dict[str, object]:
    while True:
        numbers = rng.sample(range(100), rng.randint(3, 5))
        if demo_tasks.is_held_out("largest", " ".join(map(str, sorted(numbers)))) == held:
            question = rng.choice(WORDINGS).format(", ".join(map(str, numbers)))
            return chat([(question, f"The largest is {max(numbers)}.")])


def chat(turns: list[tuple[str, str]]) -> dict[str, object]:
    said = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in turns]
    return {"messages": [message for pair in said for message in pair]}


def old(rng: random.Random) -> dict[str, object]:
    """A chat of one to three turns of the old tasks."""
    turns = demo_tasks.training_chat(rng, weights=REHEARSED)
    return chat([(turn.question, turn.answer) for turn in turns])


def write_data(folder: Path, seed: int = 0) -> None:
    rng = random.Random(seed)
    train = [*(largest(rng, False) for _ in range(NEW)), *(old(rng) for _ in range(OLD))]
    valid = {json.dumps(largest(rng, True)): None for _ in range(2 * VALID)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in train), encoding="utf-8")
    (folder / "valid.jsonl").write_text("".join(f"{line}\n" for line in list(valid)[:VALID]), encoding="utf-8")


def measure(adapter: str | None) -> dict[str, float]:
    import gemmakit
    from gemmakit.pytorch.adapters import load_adapter, merge_adapter

    name = gemmakit.demo_model()
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(name)
    model = gemmakit.AutoModelForCausalLM.from_pretrained(name)
    if adapter is not None:
        load_adapter(model, adapter)
        merge_adapter(model)
    generate = demo_tasks.greedy(model, tokenizer)
    return {task: demo_tasks.accuracy(generate, demo_tasks.held_out(task, MEASURED_ROWS, seed=1)) for task in MEASURED}


def main() -> None:
    verb, *rest = sys.argv[1:]
    if verb == "data":
        write_data(Path(rest[0]))
    else:
        before, after = measure(None), measure(rest[0]) if rest else {}
        for task, share in before.items():
            print(f"{task:<10} {share:6.1%}" + (f" {after[task]:6.1%}" if after else ""))


if __name__ == "__main__":
    main()
