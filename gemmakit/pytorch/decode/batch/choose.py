"""How the next tokens of rows that stand side by side are chosen, each as if it were alone.

Axis letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemmakit.pytorch.cache.paged import sent
from gemmakit.pytorch.decode import processors
from gemmakit.pytorch.decode.batch.events import TopLogprobs
from gemmakit.pytorch.decode.batch.requests import Row
from gemmakit.pytorch.decode.sampling import Exponential, Noise, Pick, greedy, sampler
from gemmakit.pytorch.decode.step import Step


def choose_tokens(
    rows: Sequence[Row], lengths: Sequence[int], logits: Tensor
) -> tuple[Tensor, Tensor, dict[int, Exception]]:
    """The next token of each row (NO_TOKEN where there is none), the scores it comes from, and what went wrong.

    lengths: tokens of each before the next. A row that checks proposals stands there once for each place, in order.
    logits: (R, V); tokens: int64 (R,), on the device, for which nobody has waited; scores: float32 (R, V), after each
    row's processors. A processor that raises costs its own row only: the exception is given under the row's place.
    Not even the rounding of a row's numbers depends on the others.
    """
    chain = shared_chain(rows)
    if chain is not None:
        return *Step(chain, _picker(rows)).choose(_no_ids(logits), logits), {}
    # One piece of memory for all rows, which is theirs: copies of a line each cost more than choosing from it.
    scores, errors = logits.float(), {}
    together: dict[tuple[Any, ...], list[int]] = {}
    left: set[int] = set()  # rows of which nothing more is asked
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if row.by_scores:
            together.setdefault(row.chain, []).append(i)
            continue
        if id(row) in left:
            continue
        line = scores[i : i + 1]
        try:
            _keep(line, row.process(line, length))
        except Exception as e:
            errors[i] = e
        goes_on = i + 1 < len(rows) and rows[i + 1] is row and i not in errors
        # Nothing is asked after a proposal that is forbidden: a grammar, say, knows no way on from there.
        if not goes_on or not bool(line[0, row.proposed(length)] > processors.FORBIDDEN):
            left.add(id(row))
    for chain, places in together.items():
        if chain:
            at = sent(places, scores.device)
            group = scores[at]
            scores.index_copy_(0, at, Step(chain).process(_no_ids(group), group))
    return _picker(rows)(scores), scores, errors


def _keep(line: Tensor, processed: Tensor) -> None:
    """What a processor gave, where its scores lie; it may have written there itself, or changed nothing."""
    if processed is not line:
        line.copy_(processed)


def logprobs_of(logits: Tensor) -> Tensor:
    """float32 (1, V): the log probabilities of one row of logits (V,), in memory of its own."""
    return logits[None].float().log_softmax(-1)


def likeliest(logprobs: Tensor, token: int, count: int) -> tuple[float, TopLogprobs]:
    """The log probability of a token, and the `count` best tokens with theirs. logprobs: (1, V)."""
    if not count:
        return float(logprobs[0, token]), ()
    best = logprobs[0].topk(min(count, logprobs.shape[1]))
    return float(logprobs[0, token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def shared_chain(rows: Sequence[Row]) -> tuple[processors.Processor, ...] | None:
    """The processors of all rows, if they are the same and read the scores alone."""
    first = rows[0].chain
    return first if all(row.by_scores and row.chain == first for row in rows) else None


def _no_ids(scores: Tensor) -> Tensor:
    return torch.empty((len(scores), 0), dtype=torch.long, device=scores.device)


def _picker(rows: Sequence[Row]) -> Pick:
    """Draws where a row is sampled, takes the best where not."""
    sampled = [i for i, row in enumerate(rows) if row.generator is not None]
    if not sampled:
        return greedy
    drawing = [rows[i] for i in sampled]
    draw = sampler(Exponential([row.generator for row in drawing if row.generator is not None]))
    if len(set(map(id, drawing))) < len(drawing):
        draw = sampler(_noise(drawing))
    if len(sampled) == len(rows):
        return draw

    def pick(scores: Tensor) -> Tensor:
        at = sent(sampled, scores.device)
        return greedy(scores).index_copy(0, at, draw(scores[at]))

    return pick


def _noise(rows: Sequence[Row]) -> Noise:
    """Noise of each row's own, where some stand there several times: these can take back what they draw."""

    def noise(like: Tensor) -> Tensor:
        out = torch.empty_like(like)
        for row in rows:
            row.drawn.clear()
        for line, row in zip(out, rows, strict=True):
            assert row.generator is not None
            row.drawn.append(row.generator.get_state())
            line.exponential_(generator=row.generator)
        return out

    return noise
