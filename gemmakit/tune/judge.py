"""How well a model answers held-out rows: greedy answers, compared with what the rows say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gemmakit.pipelines import TextGenerationPipeline
from gemmakit.tune.examples import Question

AT_ONCE = 32
SPARE_TOKENS = 8  # beyond the right answer's, or a wrong one that goes on would take its time


def answers(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    """What the model says to each, at most a few tokens longer than the right answer."""
    pipe = TextGenerationPipeline(model, tokenizer)
    context, said = model.config.max_position_embeddings, [""] * len(questions)
    lengths = [len(tokenizer(question.answer, add_special_tokens=False)["input_ids"]) for question in questions]
    for part in parts([len(question.prompt) for question in questions], lengths, context):
        rows = [questions[i].prompt for i in part]
        room = min(max(lengths[i] for i in part) + SPARE_TOKENS, context - max(map(len, rows)))
        if room < 1:
            continue
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": room, **pipe.turn_ends()}
        for index, new in zip(part, pipe._continue(rows, settings), strict=True):
            said[index] = tokenizer.decode(new[0], skip_special_tokens=True).strip()
    return said


def parts(prompts: Sequence[int], answers: Sequence[int], context: int) -> Iterator[list[int]]:
    """Which questions are asked at once, the longest prompts first: none of them shortens another's answer.

    prompts, answers: tokens of each.
    """
    part: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -prompts[i]):
        wanted = max(answers[j] for j in (*part, i)) + SPARE_TOKENS
        if part and (len(part) == AT_ONCE or prompts[part[0]] + wanted > context):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def accuracy(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """The share of answers that are, to the letter, what the rows say."""
    said = answers(model, tokenizer, questions)
    return sum(a == q.answer for a, q in zip(said, questions, strict=True)) / len(questions)
