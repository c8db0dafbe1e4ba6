"""token-classification: the entities of a text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch

from gemmakit.auto import AutoModelForTokenClassification
from gemmakit.errors import InputError
from gemmakit.pipelines.base import Record
from gemmakit.pipelines.classifying import ClassificationPipeline
from gemmakit.pipelines.entities import STRATEGIES, WORDWISE, Piece, continues_word, gather, lay_over


class TokenClassificationPipeline(ClassificationPipeline):
    """Labels the tokens of texts, or finds the entities they make up.

    A result is a list of {"entity", "score", "index", "word", "start", "end"}, one a token; with another
    aggregation_strategy than "none" of {"entity_group", "score", "word", "start", "end"}, one an entity. start and end
    are characters of the text, from the fast tokenizer (None from the slow one).

    Arguments of a call:
        aggregation_strategy: "none"; "simple" joins neighbours of one tag, where B- begins a new entity; "first",
            "average" and "max" first give each word one label: that of its first token, of its tokens' averaged
            probabilities, of its most certain token. Words are what spaces divide. The three need the fast tokenizer.
        ignore_labels: what to leave out; ["O"] unless said.
        stride: read all of a text longer than the context, in windows that share this many tokens; where they disagree
            the longer entity stays, then the likelier. Not with "none".
        truncation: without stride, what is longer than the context is cut, and a warning says so; True cuts without a
            warning, False raises PromptTooLong.
    """

    task = "token-classification"
    takes = "a text"
    model_class = AutoModelForTokenClassification

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, str)

    def run(
        self,
        batch: Sequence[str],
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] | None = None,
        stride: int | None = None,
        truncation: bool | None = None,
    ) -> list[list[Record]]:
        """The results of a batch, in its order; the options are described at the class."""
        strategy = self._strategy(aggregation_strategy, stride)
        ignored = {"O"} if ignore_labels is None else set(ignore_labels)
        encoded = self._encode(batch, stride, truncation)
        sources: list[int] = encoded["overflow_to_sample_mapping"]
        found: list[list[list[Record]]] = [[] for _ in batch]
        for window, scores in enumerate(self._probabilities(encoded["input_ids"], len(batch))):
            source = sources[window]
            pieces = self._pieces(batch[source], {k: v[window] for k, v in encoded.items()}, scores)
            entities = gather(pieces, strategy, self.model.config.id2label, self.tokenizer.convert_tokens_to_string)
            found[source].append([e for e in entities if e.get("entity", e.get("entity_group")) not in ignored])
        return [lay_over([*chain(*windows)]) if len(windows) > 1 else windows[0] for windows in found]

    def _strategy(self, name: Any, stride: int | None) -> str:
        strategy = str(getattr(name, "value", name)).lower()
        if strategy not in STRATEGIES:
            raise InputError(f"aggregation_strategy is {name!r}; it must be {', '.join(map(repr, STRATEGIES))}.")
        if not self.tokenizer.is_fast and (strategy in WORDWISE or stride is not None):
            what = "stride" if stride is not None else f"aggregation_strategy={strategy!r}"
            raise InputError(f"{what} needs the fast tokenizer, which knows where in the text a token is.")
        if stride is not None and strategy == "none":
            raise InputError("stride joins windows by their entities: pass an aggregation_strategy, such as 'simple'.")
        return strategy

    def _encode(self, batch: Sequence[str], stride: int | None, truncation: bool | None) -> dict[str, list[Any]]:
        """Rows of ids, with offsets, a mask of special tokens, and the place of the text that each row is of."""
        limit = self.context()
        options = dict(
            return_offsets_mapping=self.tokenizer.is_fast, return_special_tokens_mask=True, verbose=False,
            return_overflowing_tokens=True, max_length=limit,
        )  # fmt: skip
        if stride is not None:
            return self.tokenizer(list(batch), truncation=True, stride=stride, **options)
        rows = self.tokenizer(list(batch), truncation=False, **options)
        lengths = [len(row) for row in rows["input_ids"]]
        if self.cut_or_refuse(
            lengths, limit, truncation, "Pass stride= and a strategy to read all, or truncation=True."
        ):
            kept = options | {"return_overflowing_tokens": False}
            rows = self.tokenizer(list(batch), truncation=True, **kept)
            rows["overflow_to_sample_mapping"] = list(range(len(batch)))
        return rows

    def _probabilities(self, rows: Sequence[list[int]], size: int) -> list[torch.Tensor]:
        """(P, C) for each row, `size` rows at a time: a long text has more windows than a batch has texts."""
        found: list[torch.Tensor] = []
        for start in range(0, len(rows), size):
            found += self.logits(rows[start : start + size])
        if found and found[0].dim() != 2:
            raise InputError(
                f"{self.task} needs scores of every token; {type(self.model).__name__} scores whole texts."
            )
        return [logits.softmax(-1) for logits in found]

    def _pieces(self, text: str, row: dict[str, Any], scores: torch.Tensor) -> list[Piece]:
        """The tokens of a row that are text, with where they are in it."""
        pieces: list[Piece] = []
        for index, (token, special) in enumerate(zip(row["input_ids"], row["special_tokens_mask"], strict=True)):
            if special:
                continue
            piece = Piece(
                self.tokenizer.convert_ids_to_tokens(token),
                cast("list[float]", scores[index].tolist()),
                index,
                None,
                None,
            )
            if self.tokenizer.is_fast:
                piece.start, piece.stop = row["offset_mapping"][index]
                piece.continues = continues_word(text, row["offset_mapping"][index][0])
                if token == self.tokenizer.unk_token_id:
                    piece.word, piece.continues = text[piece.start : piece.stop], False
            pieces.append(piece)
        return pieces
