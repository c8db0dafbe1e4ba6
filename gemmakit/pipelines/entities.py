"""From a label a token to entities: words that agree, runs of one tag, windows laid over each other.

Nothing here knows a model: tokens with their probabilities go in, dictionaries come out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Join = Callable[[list[str]], str]  # tokens -> the text they spell

STRATEGIES = ("none", "simple", "first", "average", "max")
WORDWISE = ("first", "average", "max")


@dataclass
class Piece:
    """A token, or a word of several. start, stop: characters of the text, None without offsets."""

    word: str
    scores: list[float]  # (C,) probabilities
    index: int
    start: int | None
    stop: int | None
    continues: bool = False  # the word of the token before it

    @property
    def best(self) -> int:
        """The number of the likeliest label; of equals the first."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    @property
    def score(self) -> float:
        return self.scores[self.best]


def continues_word(text: str, start: int) -> bool:
    """Whether a token at `start` is inside a word. Words are what spaces divide: the vocabulary marks nothing else."""
    return start > 0 and " " not in text[start - 1 : start + 1]


def gather(pieces: Sequence[Piece], strategy: str, labels: dict[int, str], join: Join) -> list[dict[str, Any]]:
    """The entities of one text. "none": one a token; "simple": runs of tokens with one tag; the others: runs of words,
    each with the label of its first token, of its tokens' averaged probabilities, or of its most certain token.
    """
    if strategy == "none":
        return [
            {
                "entity": labels[p.best],
                "score": p.score,
                "index": p.index,
                "word": p.word,
                "start": p.start,
                "end": p.stop,
            }
            for p in pieces
        ]
    whole = [_word(group, strategy, join) for group in _words(pieces)] if strategy in WORDWISE else pieces
    return [_entity(run, labels, join) for run in _runs(whole, labels)]


def _words(pieces: Sequence[Piece]) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
    for piece in pieces:
        if groups and piece.continues:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _word(pieces: Sequence[Piece], strategy: str, join: Join) -> Piece:
    """The tokens of a word as one piece with the probabilities that `strategy` gives it."""
    if strategy == "first":
        scores = pieces[0].scores
    elif strategy == "max":
        scores = max(pieces, key=lambda piece: piece.score).scores
    else:
        scores = [sum(column) / len(pieces) for column in zip(*(p.scores for p in pieces), strict=True)]
    return Piece(join([p.word for p in pieces]), scores, pieces[0].index, pieces[0].start, pieces[-1].stop)


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and of what kind: "B-PER", "I-PER", or a bare "PER", which goes on."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label


def _runs(pieces: Sequence[Piece], labels: dict[int, str]) -> list[list[Piece]]:
    runs: list[list[Piece]] = []
    last = None
    for piece in pieces:
        begins, tag = _tag(labels[piece.best])
        if runs and tag == last and not begins:
            runs[-1].append(piece)
        else:
            runs.append([piece])
        last = tag
    return runs


def _entity(run: Sequence[Piece], labels: dict[int, str], join: Join) -> dict[str, Any]:
    return {
        # Whatever stands before the first hyphen is a prefix here, as it is in transformers.
        "entity_group": labels[run[0].best].split("-", 1)[-1],
        "score": sum(piece.score for piece in run) / len(run),
        "word": join([piece.word for piece in run]),
        "start": run[0].start,
        "end": run[-1].stop,
    }


def lay_over(entities: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entities of overlapping windows, in the order of the text: of two that begin within one another the longer one
    stays, of equally long ones the likelier.
    """
    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda e: e["start"]):
        if not kept or entity["start"] >= kept[-1]["end"] or entity["start"] < kept[-1]["start"]:
            kept.append(entity)
        elif (_length(entity), entity["score"]) > (_length(kept[-1]), kept[-1]["score"]):
            kept[-1] = entity
    return kept


def _length(entity: dict[str, Any]) -> int:
    return entity["end"] - entity["start"]
