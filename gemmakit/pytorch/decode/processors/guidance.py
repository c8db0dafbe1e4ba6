"""Classifier-free guidance: away from what a second, negative prompt would say. Source: arXiv:2306.17806."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.pytorch.cache import Cache, DynamicCache
from gemmakit.pytorch.decode.processors.logits import rows_of
from gemmakit.pytorch.decode.protocols import CausalLM


@dataclass
class Guidance:
    """log p + (scale - 1) * (log p - log p of the negative prompt continued with the same new tokens).

    negative: (B or 1, N) ids; mask: 0 on their padding, which must be on the left. prompt_length: P, where the new
    tokens of ids begin. cached: keep the keys of the second prompt between steps.
    """

    scale: float
    model: CausalLM
    negative: Tensor
    mask: Tensor | None
    prompt_length: int
    cached: bool
    _cache: Cache | None = field(default=None, init=False)
    _held: int = field(default=0, init=False)  # new tokens in the cache

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        other = self._logits(ids).log_softmax(-1)
        scores = scores.log_softmax(-1)
        return self.scale * (scores - other) + other

    def _logits(self, ids: Tensor) -> Tensor:
        """(B, V): what the model says after the negative prompt and the new tokens."""
        new = ids[:, self.prompt_length :]
        text = torch.cat((self._rows(self.negative, ids).to(ids), new), dim=1)
        start = self._kept(new.shape[1])
        visible = self._visible(text)
        out = self.model(
            input_ids=text[:, start:],
            attention_mask=visible,
            position_ids=None if visible is None else (visible.cumsum(-1) - 1).clamp_min(0)[:, start:],
            past_key_values=self._cache,
            use_cache=self.cached,
            return_dict=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    def _kept(self, new: int) -> int:
        """Positions that need not be run again; the newest token always is, for it may have been taken back."""
        if not self.cached:
            return 0
        if self._cache is None:
            self._cache = DynamicCache()
            self._held = new
            return 0
        kept = max(0, min(self._held, new - 1))
        self._held = new
        start = self.negative.shape[1] + kept if new else 0
        if start < self._cache.get_seq_length():
            self._cache.crop(start)
        return start

    def _visible(self, text: Tensor) -> Tensor | None:
        if self.mask is None:
            return None
        mask = self._rows(self.mask, text).to(text.device, torch.bool)
        return torch.cat((mask, mask.new_ones(text.shape[0], text.shape[1] - mask.shape[1])), dim=1)

    def _rows(self, given: Tensor, ids: Tensor) -> Tensor:
        if ids.shape[0] % given.shape[0]:
            raise InputError(
                f"negative_prompt_ids has {given.shape[0]} rows and the batch {ids.shape[0]}: "
                "give one row, or one a prompt."
            )
        return rows_of(given, ids.shape[0])
