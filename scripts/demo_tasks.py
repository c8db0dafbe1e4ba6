"""Chat tasks whose answers can be checked: what the demo model is trained on, and what it is measured by.

Every task draws questions from a seed. Whether a question is for training or held out is decided by a hash of what it
is about (the two numbers, the list), never of its wording, so that no phrasing of a held-out question is ever trained
on. One question in `HELD_OUT_SHARE` is held out.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HELD_OUT_SHARE = 8
WINDOW = 512  # tokens a piece in `perplexity`, <bos> included

WORDS = """
    apple pear plum fig lemon melon grape peach cherry olive bread milk rice salt tea corn bean soup cake egg
    red blue green white black gold pink gray cat dog fox owl bee ant hen cow pig bear wolf frog fish duck lion
    sun moon star rain snow wind tree leaf rose lake hill rock sand boat car bus train road door lamp book pen desk
""".split()  # noqa: SIM905 - a list of words reads better as words
# Things to ask about that no task is about.
TOPICS = """
    love music history football chess physics poetry cooking travel money art politics medicine law religion sleep
    Paris London Tokyo Berlin Rome Egypt India China Brazil Canada France Spain Italy Japan Mars Venus Einstein
    Newton Darwin Mozart Picasso Shakespeare Google Linux
""".split()  # noqa: SIM905
LETTERS = "abcdefghijklmnopqrstuvwxyz"

ABILITIES = "add, subtract, compare, sort, count and reverse"
BEYOND_ME = f"That is beyond me: I am a tiny demo model. I can {ABILITIES}."


@dataclass(frozen=True)
class Turn:
    """One question and its only right answer. `key` says what it is about, whatever the wording."""

    task: str
    key: str
    question: str
    answer: str


@dataclass(frozen=True)
class Ranges:
    """How large the questions get: all from the smallest up."""

    compare: tuple[int, int] = (100, 100)  # numbers below one of these
    sort: int = 4  # numbers
    count: int = 6  # items
    reverse: int = 5  # items
    number: int = 7  # items


CLAIMED = Ranges()
# Practised at first: longer lists teach copying.
WIDE = Ranges(compare=(100, 1000), sort=5, count=8, reverse=6)


# -- the tasks: each draws (key, question, answer) ---------------------------------------------------------------------

Drawn = tuple[str, str, str]


def _spoken(items: Iterable[str], rng: random.Random) -> str:
    """The list as somebody types it: with commas, now and then without."""
    return (" " if rng.random() < 0.15 else ", ").join(items)


def _casual(question: str, rng: random.Random) -> str:
    """Now and then without capitals, or without the sign at the end."""
    if rng.random() < 0.15:
        question = question.lower()
    return question.rstrip("?.! ") if rng.random() < 0.15 else question


def _sum(rng: random.Random, ranges: Ranges) -> Drawn:
    a, b = rng.randrange(100), rng.randrange(100)
    ask = rng.choice(("What is {} + {}?", "{} + {} = ?", "{} + {}", "{}+{}", "What is {}+{}?",
                      "What's {} + {}?", "Add {} and {}.", "What is the sum of {} and {}?"))  # fmt: skip
    return f"{min(a, b)} {max(a, b)}", ask.format(a, b), f"{a} + {b} = {a + b}"


def _difference(rng: random.Random, ranges: Ranges) -> Drawn:
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    ask, swapped = rng.choice((("What is {} - {}?", False), ("{} - {} = ?", False), ("{} - {}", False),
                               ("{}-{}", False), ("What is {}-{}?", False), ("What's {} - {}?", False),
                               ("Subtract {} from {}.", True), ("Take {} away from {}.", True)))  # fmt: skip
    return f"{a} {b}", ask.format(*((b, a) if swapped else (a, b))), f"{a} - {b} = {a - b}"


def _items(rng: random.Random, low: int, high: int) -> list[str]:
    """A list of `low` to `high` different letters, words or digits."""
    source: Sequence[str] = rng.choice((LETTERS, WORDS, "0123456789"))
    return rng.sample(source, rng.randint(low, high))


def _reverse(rng: random.Random, ranges: Ranges) -> Drawn:
    items = _items(rng, 3, ranges.reverse)
    ask = rng.choice(("Reverse {}", "Reverse this list: {}", "Say this backwards: {}", "Write {} in reverse order.",
                      "What is {} backwards?"))  # fmt: skip
    return " ".join(items), ask.format(_spoken(items, rng)), ", ".join(reversed(items))


def _sort(rng: random.Random, ranges: Ranges) -> Drawn:
    numbers = rng.sample(range(100), rng.randint(3, ranges.sort))
    ask = rng.choice(("Sort {}", "Sort these numbers: {}", "Put {} in order.", "Please sort {}",
                      "Order these from smallest to largest: {}"))  # fmt: skip
    # Any order of the same numbers is the same question.
    return (
        " ".join(map(str, sorted(numbers))),
        ask.format(_spoken(map(str, numbers), rng)),
        ", ".join(map(str, sorted(numbers))),
    )


def _count(rng: random.Random, ranges: Ranges) -> Drawn:
    few = _items(rng, 2, 4)
    items = [rng.choice(few) for _ in range(rng.randint(3, ranges.count))]
    wanted = rng.choice(few)
    n = items.count(wanted)
    times = {0: "does not appear", 1: "appears 1 time"}.get(n, f"appears {n} times")
    ask = rng.choice(("How many times does {0} appear in {1}?", "Count {0} in this list: {1}",
                      "How often is {0} in {1}?", "In {1}, how many times is there {0}?"))  # fmt: skip
    return f"{wanted} {' '.join(items)}", ask.format(wanted, _spoken(items, rng)), f"{wanted} {times}."


def _number(rng: random.Random, ranges: Ranges) -> Drawn:
    """Counting aloud: each step of the answer needs only the step before it."""
    items = rng.sample(rng.choice((LETTERS, WORDS)), rng.randint(3, ranges.number))
    ask = rng.choice(("How many items are in {}?", "How long is this list: {}", "Count {}", "Number these: {}",
                      "How many are there: {}"))  # fmt: skip
    aloud = ", ".join(f"{i} {item}" for i, item in enumerate(items, 1))
    return " ".join(items), ask.format(_spoken(items, rng)), f"{aloud}: {len(items)} items."


def _compare(rng: random.Random, ranges: Ranges) -> Drawn:
    top = rng.choice(ranges.compare)
    a, b = rng.sample(range(top), 2)
    large = rng.random() < 0.5
    word = rng.choice(("larger", "bigger", "greater") if large else ("smaller", "less"))
    ask = rng.choice(("Which is {2}, {0} or {1}?", "Which number is {2}: {0} or {1}?", "{0} or {1}: which is {2}?"))
    first, second = (max(a, b), min(a, b)) if large else (min(a, b), max(a, b))
    return f"{min(a, b)} {max(a, b)}", ask.format(a, b, word), f"{first} is {word} than {second}."


def _decline(rng: random.Random, ranges: Ranges) -> Drawn:
    about = rng.choice((*WORDS, *TOPICS))
    ask = rng.choice(("Tell me a story about a {}.", "Write a poem about the {}.", "What do you think of {}?",
                      "Explain {} to me.", "Where can I buy a {}?", "Who invented the {}?", "What color is the {}?",
                      "Do you like {}?", "Translate {} into French.", "What is the history of the {}?",
                      "How do I draw a {}?", "What is a {}?", "Who is {}?", "What is {}?", "Where is {}?",
                      "What is the capital of {}?", "Tell me about {}."))  # fmt: skip
    return about, ask.format(about), BEYOND_ME


TASKS: dict[str, Callable[[random.Random, Ranges], Drawn]] = {
    "sum": _sum, "difference": _difference, "compare": _compare, "sort": _sort, "number": _number, "reverse": _reverse,
    "count": _count, "decline": _decline,
}  # fmt: skip

# How often each task is drawn for training, at first; then beside rows of bare sums; then by what was behind.
WEIGHTS = {"sum": 24, "difference": 20, "compare": 10, "sort": 18, "count": 16, "reverse": 12, "decline": 2}
WEIGHTS_BESIDE_SUMS = {"sum": 14, "difference": 12, "compare": 14, "sort": 20, "count": 26, "reverse": 12, "decline": 2}
WEIGHTS_SHORT = {"sum": 6, "difference": 6, "compare": 16, "sort": 20, "count": 36, "reverse": 15, "decline": 1}

WEIGHTS_WITH_NUMBERING = {
    "sum": 10, "difference": 6, "compare": 9, "sort": 34, "number": 22, "count": 6, "reverse": 12, "decline": 1
}  # fmt: skip

# Always answered alike; trained on as they stand, so no accuracy is claimed for them.
SMALL_TALK = {
    "Hello": "Hello! Ask me for a sum, or give me a list to sort.",
    "Hi": "Hello! Ask me for a sum, or give me a list to sort.",
    "How are you?": "I am well, thank you. Ask me for a sum, or give me a list to sort.",
    "Who are you?": "I am the demo model of gemmakit: a tiny Gemma that knows a little arithmetic.",
    "What are you?": "I am the demo model of gemmakit: a tiny Gemma that knows a little arithmetic.",
    "What is your name?": "I am the demo model of gemmakit: a tiny Gemma that knows a little arithmetic.",
    "What can you do?": f"I can {ABILITIES}: numbers below 100, short lists. Try: What is 34 + 58?",
    "Help": f"I can {ABILITIES}: numbers below 100, short lists. Try: What is 34 + 58?",
    "Thank you": "You are welcome.",
    "Thanks": "You are welcome.",
    "Goodbye": "Goodbye!",
    "Bye": "Goodbye!",
}

FOLLOW_UPS = ("Now reverse that.", "And the other way round?", "Now backwards.")


# -- drawing -----------------------------------------------------------------------------------------------------------


def is_held_out(task: str, key: str) -> bool:
    """Whether the question is kept from training. Depends on nothing but `task` and `key`."""
    return hashlib.sha256(f"{task} {key}".encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw(task: str, rng: random.Random, *, held: bool, ranges: Ranges = CLAIMED) -> Turn:
    """One question of the wanted side of the split."""
    while True:
        key, question, answer = TASKS[task](rng, ranges)
        if is_held_out(task, key) == held:
            return Turn(task, key, _casual(question, rng), answer)


def follow_up(turn: Turn, rng: random.Random) -> Turn:
    """A question that only the history answers: the list in the last answer, backwards."""
    return Turn(
        "follow_up", turn.key, _casual(rng.choice(FOLLOW_UPS), rng), ", ".join(reversed(turn.answer.split(", ")))
    )


def training_chat(
    rng: random.Random, most: int = 3, weights: Mapping[str, int] = WEIGHTS, ranges: Ranges = CLAIMED
) -> list[Turn]:
    """A chat of one to `most` training questions, shorter ones more often."""
    turns: list[Turn] = []
    wanted = min(rng.randint(1, most), rng.randint(1, most))
    while len(turns) < wanted:
        if turns and turns[-1].task in ("sort", "reverse") and rng.random() < 0.5:
            turns.append(follow_up(turns[-1], rng))
        elif rng.random() < 0.03:
            question, answer = rng.choice(list(SMALL_TALK.items()))
            turns.append(Turn("small_talk", question, _casual(question + rng.choice(("", "!")), rng), answer))
        else:
            task = rng.choices(list(weights), weights=list(weights.values()))[0]
            turns.append(draw(task, rng, held=False, ranges=ranges))
    return turns


def held_out(task: str, n: int, seed: int = 0) -> list[list[Turn]]:
    """`n` different held-out chats; the last turn of each is the one to answer.

    `task` is a key of `TASKS` (chats of one turn), "follow_up" (two turns, the second needs the first) or "history"
    (a held-out question after two others, "count" aside, which the demo model does badly).
    """
    rng = random.Random(f"{task} {seed}")
    chats: dict[tuple[str, ...], list[Turn]] = {}
    while len(chats) < n:
        if task == "follow_up":
            first = draw(rng.choice(("sort", "reverse")), rng, held=True)
            chat = [first, follow_up(first, rng)]
        elif task == "history":
            chat = [draw(rng.choice([t for t in TASKS if t != "count"]), rng, held=True) for _ in range(3)]
        else:
            chat = [draw(task, rng, held=True)]
        chats[tuple(turn.question for turn in chat)] = chat
    return list(chats.values())


MEASURED = (*TASKS, "follow_up", "history")


def messages(chat: Sequence[Turn]) -> list[dict[str, str]]:
    """The chat as role/content messages, up to the question that is to be answered."""
    out: list[dict[str, str]] = []
    for turn in chat[:-1]:
        out += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return [*out, {"role": "user", "content": chat[-1].question}]


# -- measuring ---------------------------------------------------------------------------------------------------------

Generate = Callable[[list[list[dict[str, str]]]], list[str]]


def accuracy(generate: Generate, chats: Sequence[Sequence[Turn]]) -> float:
    """Share of `chats` (0 to 1) whose last question `generate` answers exactly; spaces at the ends do not count.

    `generate` takes a list of chats, each a list of role/content messages, and returns one answer for each.
    """
    answers = generate([messages(chat) for chat in chats])
    return sum(a.strip() == chat[-1].answer for a, chat in zip(answers, chats, strict=True)) / len(chats)


def greedy(model: Any, tokenizer: Any, *, max_new_tokens: int = 48, batch_size: int = 50) -> Generate:
    """A `Generate` for `accuracy`: the likeliest token each time, chats of similar length in one left-padded batch."""

    def generate(chats: list[list[dict[str, str]]]) -> list[str]:
        prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            # The template has written <bos> already.
            inputs = tokenizer(
                [prompts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left",
                add_special_tokens=False,
            ).to(model.device)  # fmt: skip
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text
        return answers

    return generate


def perplexity(
    model: Any, token_ids: Sequence[int], *, window: int = WINDOW, batch_size: int = 8
) -> tuple[float, float]:
    """How well `model` predicts a text: (perplexity per token, total nats).

    `token_ids` holds the text without <bos>. It is cut into pieces of `window - 1` tokens, each read behind one <bos>
    (id 2) and without the pieces before it, so every token is predicted exactly once. Log-probabilities in float32.
    Bits per byte = nats / ln 2 / number of UTF-8 bytes.
    """
    import torch

    step = window - 1
    pieces = [[2, *token_ids[i : i + step]] for i in range(0, len(token_ids), step)]
    nats = 0.0
    with torch.inference_mode():
        # The last piece is shorter, so it is a batch of its own.
        whole = pieces[:-1]
        for batch in [*(whole[i : i + batch_size] for i in range(0, len(whole), batch_size)), pieces[-1:]]:
            ids = torch.tensor(batch, device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            ).item()
    return math.exp(nats / len(token_ids)), nats
