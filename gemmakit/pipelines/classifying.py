"""What both classification tasks do: cut to the context, run rows of different lengths, name the labels."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gemmakit.errors import InputError, NumericalError, PromptTooLong
from gemmakit.pipelines.base import Pipeline, is_flax, padded

# Their frequencies depend on how long the padded batch is, and so on the other rows.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class ClassificationPipeline(Pipeline):
    """A pipeline whose model scores labels; a loaded one without labels is refused."""

    def __init__(self, model: Any, tokenizer: Any, **options: Any):
        if is_flax(model) or not isinstance(getattr(model, "num_labels", None), int):
            raise InputError(f"{self.task} needs a PyTorch model with labels; {type(model).__name__} is none.")
        super().__init__(model, tokenizer, **options)

    def context(self, max_length: int | None = None) -> int:
        """Tokens that a row may have, special ones included: what the model, its tokenizer and the call allow."""
        limits = (max_length, self.model.config.max_position_embeddings, self.tokenizer.model_max_length)
        return min(limit for limit in limits if limit is not None)

    def cut_or_refuse(self, lengths: Sequence[int], limit: int, truncation: Any, remedy: str = "") -> bool:
        """Whether rows of these lengths must be cut to `limit`; says so unless `truncation` asked for it.

        Raises PromptTooLong for truncation=False.
        """
        long = [(place, length) for place, length in enumerate(lengths) if length > limit]
        if not long:
            return False
        place, length = long[0]
        more = f" (and {len(long) - 1} more)" if len(long) > 1 else ""
        what = f"text {place} of this batch{more} has {length} tokens, but {limit} are the limit"
        if truncation in (False, "do_not_truncate"):
            raise PromptTooLong(f"{what}. Shorten it, or pass truncation=True.")
        if truncation is None:
            warnings.warn(
                f"{what}: the rest is not read. {remedy or 'Pass truncation=True.'}", UserWarning, stacklevel=6
            )
        return True

    def logits(self, rows: Sequence[list[int]]) -> list[torch.Tensor]:
        """What the model gives each row, in float32 on the CPU: (C,), or (P, C) with P of the longest row beside it."""
        out: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for members in self._together(rows):
            # On the right: there padding moves no token to another position.
            ids, mask = padded([rows[i] for i in members], self.tokenizer.pad_token_id or 0, self.device, "right")
            with torch.no_grad(), _evaluating(self.model):
                found = self.model(ids, attention_mask=mask, use_cache=False, return_dict=True).logits.float().cpu()
            for i, row in zip(members, found, strict=True):
                out[i] = row if row.dim() == 1 else row[: len(rows[i])]
        if not all(bool(row.isfinite().all()) for row in out):
            raise NumericalError(f"{self.task}: the model's scores are not finite. Try dtype=torch.float32.")
        return out

    def _together(self, rows: Sequence[list[int]]) -> list[list[int]]:
        """The places of rows that can share a forward pass without changing each other's result."""
        rope: Mapping[str, Any] = self.model.config.rope_parameters or {}
        if not rows or rope.get("rope_type") not in LENGTH_DEPENDENT_ROPE:
            return [list(range(len(rows)))] if rows else []
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(len(row), []).append(i)
        return list(groups.values())

    def label(self, index: int) -> str:
        """The name of a label's number."""
        return self.model.config.id2label[index]


@contextmanager
def _evaluating(model: Any) -> Generator[None, None, None]:
    """Without dropout, also where the model is in the middle of its training."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
