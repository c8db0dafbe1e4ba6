"""The sequences being decoded, what each may see, and the cache that holds them: what every strategy runs on.

Axis letters: R rows (prompts times their copies), P prompt positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gemmakit.outputs import CausalLMOutputWithPast
from gemmakit.pytorch.decode import packing
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.step import forward


class Rows:
    """A token buffer (R, total) that is filled from the left, and one way to run the model over a part of it.

    length: how many places of the buffer are tokens. offset: how many positions the cache holds before the buffer's
    first, when the prompt continues a conversation or came as embeddings.
    """

    def __init__(
        self, model: Any, prompt: Prompt, total: int, pad: int, *, attentions: bool = False, hidden_states: bool = False
    ):
        self.model, self.prompt, self.cache = model, prompt, prompt.cache
        self.attentions, self.hidden_states = attentions, hidden_states
        R, P = prompt.ids.shape
        self.length = P
        self.device = prompt.ids.device
        self.buffer = torch.full((R, total), pad, dtype=torch.long, device=self.device)
        self.buffer[:, :P] = prompt.ids
        self.offset = 0 if prompt.mask is None else prompt.mask.shape[1] - P
        self.mask = self.positions = None
        if prompt.mask is not None:
            self.mask = torch.ones((R, prompt.mask.shape[1] + total - P), dtype=torch.bool, device=self.device)
            self.mask[:, : prompt.mask.shape[1]] = prompt.mask
            self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)

    @property
    def ids(self) -> Tensor:
        """(R, length): prompt and new tokens so far."""
        return self.buffer[:, : self.length]

    @property
    def total(self) -> int:
        return self.buffer.shape[1]

    def append(self, token: Tensor) -> Tensor:
        """token: (R,) -> ids (R, length) with it; NO_TOKEN is written as 0."""
        torch.clamp(token, min=0, out=self.buffer[:, self.length])
        self.length += 1
        return self.ids

    def forward(self, start: int, end: int, embeds: Tensor | None = None, keep: int = 1) -> Any:
        """Run places start..end of the buffer (or `embeds` in their place); logits of the last `keep` of them."""
        seen = end + self.offset
        count = end - start if embeds is None else embeds.shape[1]
        return forward(
            self.model,
            None if embeds is not None else self.buffer[:, start:end],
            self.cache,
            None if self.mask is None else self.mask[:, :seen],
            None if self.positions is None else self.positions[:, seen - count : seen],
            embeds=embeds,
            keep=keep,
            attentions=self.attentions,
            hidden_states=self.hidden_states,
        )

    def prefill(self, copies: int = 1, chunk: int | None = None) -> Any:
        """Run the prompt, once; then every row becomes `copies` rows, and so does what the pass returned."""
        start, end = self.prompt.past, self.length
        if self.prompt.embeds is not None:
            return self._spread(self.forward(start, end, self.prompt.embeds), copies)
        if chunk is None and self._packs():
            assert self.mask is not None and self.positions is not None
            mask, positions = self.mask[:, :end], self.positions[:, :end]
            return self._spread(packing.prefill(self.model, self.ids, mask, positions, self.cache), copies)
        while chunk is not None and self.cache is not None and end - start > chunk:
            self.forward(start, start + chunk)
            start += chunk
        return self._spread(self.forward(start, end), copies)

    def _packs(self) -> bool:
        """Whether the prompts are whole, padded, and better run without their padding."""
        if self.mask is None or self.offset or self.prompt.past or self.attentions or self.hidden_states:
            return False
        return packing.pays(self.model, self.mask[:, : self.length])

    def next(self) -> Any:
        """Run the newest token, or without a cache everything again."""
        return self.forward(0 if self.cache is None else self.length - 1, self.length)

    def _spread(self, out: CausalLMOutputWithPast, copies: int) -> CausalLMOutputWithPast:
        if copies == 1:
            return out
        self.buffer = self.buffer.repeat_interleave(copies, dim=0)
        if self.mask is not None and self.positions is not None:
            self.mask = self.mask.repeat_interleave(copies, dim=0)
            self.positions = self.positions.repeat_interleave(copies, dim=0)
        if self.cache is not None:
            self.cache.batch_repeat_interleave(copies)
        kept = {n: _repeated(getattr(out, n), copies) for n in ("logits", "attentions", "hidden_states")}
        return replace(out, **kept)


def _repeated(value: Any, copies: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_repeated(v, copies) for v in value)
    return None if value is None else value.repeat_interleave(copies, dim=0)
