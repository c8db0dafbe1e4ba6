"""What the training of the demo model says: progress, measurements, the model card."""

from __future__ import annotations

import math
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import demo_corpus
import demo_tasks

CLAIM = 0.95  # the least accuracy that the card calls an ability
# Not 0, with which one looks at a training on its way: the questions of the card decided nothing.
SEED = 1

DESCRIPTIONS = {
    "sum": ("two numbers from 0 to 99", "What is 34 + 58?", "34 + 58 = 92"),
    "difference": ("two numbers from 0 to 99, the larger one first", "What is 80 - 23?", "80 - 23 = 57"),
    "compare": ("two numbers from 0 to 99", "Which is larger, 47 or 53?", "53 is larger than 47."),
    "sort": ("3 or 4 different numbers from 0 to 99", "Sort 41, 7, 23", "7, 23, 41"),
    "number": (
        "the items of a list of 3 to 7 letters or words",
        "How many items are in fig, pear, cat?",
        "1 fig, 2 pear, 3 cat: 3 items.",
    ),
    "count": (
        "how often an item is in a list of 3 to 6",
        "How often is fig in fig, pear, fig?",
        "fig appears 2 times.",
    ),
    "reverse": ("3 to 5 different letters, digits or words", "Reverse c, a, t", "t, a, c"),
    "decline": ("questions of other kinds, in wordings it knows", "What is a lemon?", demo_tasks.BEYOND_ME),
    "follow_up": ("the list just answered, backwards", "Now reverse that.", "41, 23, 7"),
    "history": ("any of the tasks after two other questions", "...", "..."),
}


class Progress:
    """Says every ten seconds how far the training is: a bar on a terminal, a line elsewhere."""

    def __init__(self, steps: int, tokens: int):
        """`steps` in the whole training, `tokens` a step."""
        self._steps, self._tokens = steps, tokens
        self._said = self._started = time.monotonic()
        self._first: int | None = None
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import Progress as Bar

            self._bar = Bar()
            self._task = self._bar.add_task("training", total=steps)
            self._bar.start()

    def __call__(self, step: int, loss: Any) -> None:
        """After each step; `loss` a scalar tensor, read only when it is shown."""
        self._first = step - 1 if self._first is None else self._first
        now = time.monotonic()
        if now - self._said < 10 and step < self._steps:
            return
        self._said = now
        pace = (step - self._first) / (now - self._started)
        text = f"loss {loss.item():.3f}  {pace * self._tokens:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            if step == self._steps:
                self._bar.stop()
        else:
            print(f"step {step}/{self._steps}  {text}  {(self._steps - step) / pace / 60:.1f} min left", flush=True)


# -- measurement -------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Held-out measurements of one precision."""

    perplexity: float  # per token
    bits_per_byte: float
    questions: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)  # 0 to 1


def load(folder: Path, dtype: str) -> tuple[Any, Any]:
    from gemmakit import GemmaForCausalLM, GemmaTokenizer

    return GemmaForCausalLM.from_pretrained(folder, dtype=dtype), GemmaTokenizer.from_pretrained(folder)


def measure(folder: Path, held_out: Path, questions: int, dtype: str) -> Results:
    """Perplexity of the text in the file `held_out` and accuracy on held-out questions, of the model saved in `folder`.

    The stored weights are used as they are, or computed with in float32 when `dtype` is "float32".
    """
    model, tokenizer = load(folder, dtype)
    text = held_out.read_text(encoding="utf-8")
    perplexity, nats = demo_tasks.perplexity(model, tokenizer.encode(text, add_special_tokens=False))
    results = Results(perplexity, nats / math.log(2) / len(text.encode()))
    answer = demo_tasks.greedy(model, tokenizer)
    for task in demo_tasks.MEASURED:
        chats = demo_tasks.held_out(task, questions, SEED)
        results.questions[task] = len(chats)
        results.accuracy[task] = demo_tasks.accuracy(answer, chats)
        print(f"{dtype}  {task}: {results.accuracy[task]:.1%} of {len(chats)}", flush=True)
    print(f"{dtype}  perplexity {results.perplexity:.2f}, {results.bits_per_byte:.3f} bits a byte", flush=True)
    return results


# -- model card --------------------------------------------------------------------------------------------------------


def write_card(folder: Path, stored: Results, wide: Results, recipe: dict[str, Any], command: str, note: str) -> None:
    """Write README.md into `folder`.

    Args:
        stored: measured in the weights' own precision, as everybody loads them. wide: the same weights in float32.
        recipe: sizes and settings of the training, with steps, tokens and minutes.
        command: what made the model. note: what else is to be said about its making.
    """
    import torch

    able = [t for t in demo_tasks.MEASURED if min(stored.accuracy[t], wide.accuracy[t]) >= CLAIM]
    weak = [t for t in demo_tasks.MEASURED if t not in able]
    size = sum(p.stat().st_size for p in folder.iterdir() if p.name != "README.md")
    rows = "\n".join(f"| {name} | {value} |" for name, value in recipe.items() if name not in ("tokens", "minutes"))
    below = (
        f"\n## What it does badly\n\nBelow {CLAIM:.0%}, so not claimed:\n\n{_table(weak, stored, wide)}\n"
        if weak
        else ""
    )
    card = f"""---
license: apache-2.0
language: en
library_name: gemmakit
pipeline_tag: text-generation
---

# The demo model of gemmakit

A tiny Gemma, {size:,} bytes in all, with a vocabulary in Gemma's own layout (ids 0 to 472 are the released ones:
special tokens, turns, newline and space runs, tags, bytes; the other {recipe["vocab_size"] - 473:,} are learned).
It shows that an installation works, and it is the yardstick for every change that may cost quality, such as
quantization. It knows no facts and it is no assistant.

## What it does

Each line is exact match of the greedy answer, on held-out questions. What a question is about (the numbers, the list)
decides by a hash whether it is held out, so no wording of it was trained on. "As stored" computes in bfloat16, as
`from_pretrained` loads the weights; "float32" computes with the same weights in float32.

{_table(able, stored, wide)}

{_samples(folder)}
{below}
## How well it predicts text

| held-out text (`benchmarks/data/held_out.txt`) | as stored | float32 |
|---|---|---|
| perplexity a token | {stored.perplexity:.3f} | {wide.perplexity:.3f} |
| bits a byte | {stored.bits_per_byte:.4f} | {wide.bits_per_byte:.4f} |

The text is cut into pieces of {demo_tasks.WINDOW - 1} tokens; each is read behind one `<bos>`, without those before it.

## How it was made

    {command}

{recipe["tokens"]:,} tokens in {recipe["minutes"]:.0f} minutes on {recipe["threads"]} threads of a shared CPU; torch \
{torch.__version__}, Python {platform.python_version()}.

{textwrap.fill(note, 119)}

| setting | value |
|---|---|
{rows}

Text: {demo_corpus.LICENCE}.
Copyright (c) 2001 Python Software Foundation; all rights reserved. The model may repeat pieces of it.
Chats: drawn by `scripts/demo_tasks.py`, nobody's conversations. What the batches hold when: `STAGES` in
`scripts/train_demo.py`.

## Limits

Numbers, lists and wordings other than those above give confident nonsense. Its context is {recipe["context"]} tokens.
Continuations of text look like Python documentation and mean nothing.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def _table(tasks: Sequence[str], stored: Results, wide: Results) -> str:
    lines = ["| task | about | question | answer | held out | as stored | float32 |", "|---|---|---|---|---|---|---|"]
    for task in tasks:
        about, question, answer = DESCRIPTIONS[task]
        lines.append(
            f"| {task} | {about} | {question} | {answer} | {stored.questions[task]} "
            f"| {stored.accuracy[task]:.1%} | {wide.accuracy[task]:.1%} |"
        )
    return "\n".join(lines)


def _samples(folder: Path) -> str:
    """A chat with the model just saved, as it answers."""
    model, tokenizer = load(folder, "auto")
    answer, chat, lines = demo_tasks.greedy(model, tokenizer), [], ["A chat, in its own words:", ""]
    for question in ("Hello", "What is 47 + 38?", "Sort 31, 4, 59, 26", "Now reverse that.", "What is love?"):
        chat.append({"role": "user", "content": question})
        said = answer([chat])[0].strip()
        chat.append({"role": "assistant", "content": said})
        lines += [f"    > {question}", f"    {said}"]
    return "\n".join(lines)
