"""text-classification: the labels of a text, or of a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from gemmakit.auto import AutoModelForSequenceClassification
from gemmakit.checks import Whole, check
from gemmakit.errors import InputError
from gemmakit.pipelines.base import Record
from gemmakit.pipelines.classifying import ClassificationPipeline

Text = str | Mapping[str, str]

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}
# top_k=1 gives a list of one label; no top_k at all gives the label itself.
UNSET: Any = object()


class TextClassificationPipeline(ClassificationPipeline):
    """Labels texts, and pairs of texts given as {"text": ..., "text_pair": ...}.

    A result is {"label": name, "score": number} of the best label; with `top_k`, a list of them, the best first. A
    single string without `top_k` in its call gives its result inside a list, as transformers does.

    Arguments of a call:
        top_k: how many labels; None for all.
        function_to_apply: "softmax", "sigmoid" or "none"; None takes "none" for regression, "sigmoid" for a single
            label or several at once, and "softmax" otherwise (`config.problem_type`, `config.num_labels`).
        truncation: what is longer than the context is cut, and a warning says so; True cuts without a warning, False
            raises PromptTooLong.
        max_length: a limit below the context's.
        padding: accepted, and without effect: rows do not depend on it.
    """

    task = "text-classification"
    takes = "a text or a pair {'text': ..., 'text_pair': ...}"
    model_class = AutoModelForSequenceClassification

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        result = super().__call__(inputs, batch_size=batch_size, **options)
        return [result] if isinstance(inputs, str) and "top_k" not in options else result

    def is_one(self, inputs: Any) -> bool:
        if isinstance(inputs, Mapping):
            return {"text"} <= set(inputs) <= {"text", "text_pair"} and all(isinstance(t, str) for t in inputs.values())
        return isinstance(inputs, str)

    def run(
        self,
        batch: Sequence[Text],
        *,
        top_k: int | None = UNSET,
        function_to_apply: str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
    ) -> list[Any]:
        """The results of a batch, in its order; the options are described at the class."""
        _check_top_k(top_k)
        function = self._function(function_to_apply)
        found = self.logits(self._rows(batch, truncation, max_length))
        if found and found[0].dim() != 1:
            raise InputError(f"{self.task} needs one score a label; {type(self.model).__name__} scores every token.")
        ranked = [self._ranked(function(logits)) for logits in found]
        return [labels[0] for labels in ranked] if top_k is UNSET else [labels[:top_k] for labels in ranked]

    def _rows(self, batch: Sequence[Text], truncation: Any, max_length: int | None) -> list[list[int]]:
        texts = [(t, None) if isinstance(t, str) else (t["text"], t.get("text_pair")) for t in batch]
        limit = self.context(max_length)

        def encode(text: str, pair: str | None, **options: Any) -> list[int]:
            return list(self.tokenizer(text, pair, verbose=False, **options)["input_ids"])

        rows = [encode(*text, truncation=False) for text in texts]
        if not self.cut_or_refuse([len(row) for row in rows], limit, truncation):
            return rows
        cut = truncation or True
        return [
            row if len(row) <= limit else encode(*text, truncation=cut, max_length=limit)
            for row, text in zip(rows, texts, strict=True)
        ]

    def _function(self, name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
        if name is None:
            config = self.model.config
            several = config.problem_type == "multi_label_classification" or config.num_labels == 1
            name = "none" if config.problem_type == "regression" else "sigmoid" if several else "softmax"
        function = FUNCTIONS.get(str(name).lower())
        if function is None:
            raise InputError(f"function_to_apply is {name!r}; it must be {', '.join(map(repr, FUNCTIONS))} or None.")
        return function

    def _ranked(self, scores: torch.Tensor) -> list[Record]:
        """Every label, the best first. scores: (C,)."""
        labels: list[Record] = [
            {"label": self.label(i), "score": score} for i, score in enumerate(cast("list[float]", scores.tolist()))
        ]
        return sorted(labels, key=lambda label: -label["score"])


def _check_top_k(top_k: Any) -> None:
    if top_k is not UNSET and top_k is not None:
        check("top_k", top_k, Whole(1), InputError)
