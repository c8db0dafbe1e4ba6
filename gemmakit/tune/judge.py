"""How well a model answers held-out rows: greedy answers, compared with what the rows say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemmakit.pipelines import TextGenerationPipeline
from gemmakit.tune.examples import Question

AT_ONCE = 32
SPARE_TOKENS = 8  # beyond the right answer's, or a wrong one that goes on would take its time


def answers(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    """What the model says to each, at most a few tokens longer than the right answer."""
    pipe = TextGenerationPipeline(model, tokenizer)
    context, said = model.config.max_position_embeddings, [""] * len(questions)
    longest_first = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    for start in range(0, len(questions), AT_ONCE):
        part = longest_first[start : start + AT_ONCE]
        rows = [questions[i].prompt for i in part]
        lengths = [len(tokenizer(questions[i].answer, add_special_tokens=False)["input_ids"]) for i in part]
        room = min(max(lengths) + SPARE_TOKENS, context - max(map(len, rows)))
        if room < 1:
            continue
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": room, **pipe.turn_ends()}
        for index, new in zip(part, pipe._continue(rows, settings), strict=True):
            said[index] = tokenizer.decode(new[0], skip_special_tokens=True).strip()
    return said


def accuracy(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """The share of answers that are, to the letter, what the rows say."""
    said = answers(model, tokenizer, questions)
    return sum(a == q.answer for a, q in zip(said, questions, strict=True)) / len(questions)
