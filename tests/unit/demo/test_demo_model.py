"""The demo model is what its card says: a sample of every number on the card is measured again here."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import demo_card
import demo_corpus
import demo_tasks
import pytest

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "gemmakit" / "demo"
HELD_OUT = ROOT / "benchmarks" / "data" / "held_out.txt"
SAMPLE = 50  # questions a task


@pytest.fixture(scope="module")
def card() -> str:
    return (DEMO / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def claims(card: str) -> dict[str, tuple[int, float]]:
    """task -> (questions, accuracy in float32) as the card says, of the abilities alone."""
    able = card.split("## What it does badly")[0].split("## How well")[0]
    rows = re.findall(r"^\| (\w+) \|.*\| (\d+) \| [\d.]+% \| ([\d.]+)% \|$", able, re.MULTILINE)
    return {task: (int(n), float(percent) / 100) for task, n, percent in rows}


@pytest.fixture(scope="module")
def loaded():
    # float32: the same numbers on every machine, and no slow path on CPUs without bfloat16.
    return demo_card.load(DEMO, "float32")


@pytest.fixture(scope="module")
def answers(loaded):
    return demo_tasks.greedy(*loaded)


def test_the_folder_is_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 8_000_000


def test_answers_end_at_eos_or_at_the_end_of_the_turn():
    assert json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"] == [1, 107]


def test_the_card_claims_only_what_is_reached(claims):
    assert claims
    for task, (questions, accuracy) in claims.items():
        assert questions >= 300, task
        assert accuracy >= demo_card.CLAIM, task


def test_a_sample_of_every_claim_holds(claims, answers):
    right = 0
    for task, (questions, claimed) in claims.items():
        # The first questions of those that were measured for the card.
        chats = demo_tasks.held_out(task, questions, demo_card.SEED)[:SAMPLE]
        measured = demo_tasks.accuracy(answers, chats)
        # Four standard deviations of a sample this large, and one question for rounding.
        slack = 4 * math.sqrt(claimed * (1 - claimed) / SAMPLE) + 1 / SAMPLE
        assert measured >= claimed - slack, f"{task}: the card says {claimed:.1%}, measured {measured:.1%}"
        right += round(measured * SAMPLE)
    assert right / (SAMPLE * len(claims)) >= demo_card.CLAIM


def test_perplexity_is_the_cards(card, loaded):
    model, tokenizer = loaded
    text = HELD_OUT.read_text(encoding="utf-8")
    perplexity, nats = demo_tasks.perplexity(model, tokenizer.encode(text, add_special_tokens=False))
    said = {name: float(n) for name, n in re.findall(r"^\| (perplexity|bits) .*\| ([\d.]+) \|$", card, re.MULTILINE)}
    # Other CPUs add up in another order: far below one part in a thousand.
    assert perplexity == pytest.approx(said["perplexity"], rel=1e-3)
    assert nats / math.log(2) / len(text.encode()) == pytest.approx(said["bits"], rel=1e-3)


def test_perplexity_predicts_every_token_once(loaded):
    """Against one window at a time, by another route: `labels`."""
    model, tokenizer = loaded
    import torch

    ids = tokenizer.encode("The with statement wraps the execution of a block.", add_special_tokens=False)
    nats = 0.0
    for start in range(0, len(ids), 7):
        piece = torch.tensor([[2, *ids[start : start + 7]]])
        with torch.no_grad():
            nats += model(input_ids=piece, labels=piece).loss.item() * (piece.shape[1] - 1)
    assert demo_tasks.perplexity(model, ids, window=8)[1] == pytest.approx(nats, rel=1e-4)


def test_training_never_sees_a_held_out_question():
    rng = random.Random(1)
    for _ in range(3000):
        for turn in demo_tasks.training_chat(rng):
            if turn.task in demo_tasks.TASKS:
                assert not demo_tasks.is_held_out(turn.task, turn.key), turn


@pytest.mark.parametrize("task", demo_tasks.MEASURED)
def test_held_out_questions_are_held_out_and_different(task):
    chats = demo_tasks.held_out(task, 300)
    assert len({tuple(turn.question for turn in chat) for chat in chats}) == 300
    assert demo_tasks.held_out(task, 300)[:50] == demo_tasks.held_out(task, 50)
    for chat in chats:
        assert all(demo_tasks.is_held_out(t.task, t.key) for t in chat if t.task in demo_tasks.TASKS)


def test_stated_answers_are_right():
    """Each answer by another route than the one that made it."""
    rng = random.Random(2)
    for _ in range(300):
        turn = demo_tasks.draw("sum", rng, held=False)
        left, right = turn.answer.split(" = ")
        assert sum(map(int, left.split(" + "))) == int(right)
        turn = demo_tasks.draw("difference", rng, held=False)
        a, b, c = map(int, re.findall(r"\d+", turn.answer))
        assert b + c == a
        assert sorted((a, b)) == sorted(map(int, re.findall(r"\d+", turn.question)))
        numbers = list(map(int, demo_tasks.draw("sort", rng, held=False).answer.split(", ")))
        assert numbers == sorted(set(numbers))


def test_accuracy_counts_only_exact_answers():
    chats = demo_tasks.held_out("sum", 20)
    assert demo_tasks.accuracy(lambda asked: [chat[-1].answer + "\n" for chat in chats], chats) == 1.0
    assert demo_tasks.accuracy(lambda asked: [chat[-1].answer + "0" for chat in chats], chats) == 0.0


def test_training_text_shares_no_paragraph_with_the_held_out_text():
    held = HELD_OUT.read_text(encoding="utf-8")
    texts = demo_corpus.training_texts(demo_corpus.documents(), held)
    assert len(texts) > 1000

    def paragraphs(text: str) -> set[str]:
        flat = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
        return {p for p in flat if len(p) >= 40}

    unseen = paragraphs(held)
    assert len(unseen) > 100
    assert not [p for text in texts for p in paragraphs(text) & unseen]
