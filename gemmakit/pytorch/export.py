"""A decoding step as a module of tensors alone, which torch.export can write down.

Axis letters: B batch, S positions of a call, K kv heads, T room in the cache, H head_dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.pytorch.cache import StaticCache


class DecodeStep(nn.Module):
    """A causal language model with its static cache as buffers `keys_0`, `values_0`, ..., each (B, K, T, H).

    Args:
        model: a GemmaForCausalLM; its parameters are shared, not copied.
        batch_size: B, fixed.
        max_cache_len: T, tokens there is room for.

    Example:
        program = torch.export.export(DecodeStep(model, 1, 256), (ids[:, :1], torch.tensor([0])))
    """

    def __init__(self, model: Any, batch_size: int, max_cache_len: int):
        super().__init__()
        self.model, self.max_cache_len = model, max_cache_len
        cache = StaticCache(model.config, batch_size, max_cache_len, model.device, model.dtype)
        for i, layer in enumerate(cache.layers):
            self.register_buffer(f"keys_{i}", layer._keys, persistent=False)
            self.register_buffer(f"values_{i}", layer._values, persistent=False)

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """input_ids: (B, S); cache_position: (S,), the places they go to. Returns logits (B, S, V)."""
        # A new cache around the old memory: an exported program keeps tensors, and nothing else, from call to call.
        cache = StaticCache(self.model.config, max_cache_len=self.max_cache_len)
        for i, layer in enumerate(cache.layers):
            layer._keys, layer._values = getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")
        return self.model(input_ids, past_key_values=cache, cache_position=cache_position, return_dict=True).logits

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
