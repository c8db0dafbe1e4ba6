"""A padded batch of prompts run without its padding: the rows' tokens laid end to end, each row seeing itself alone.

Axis letters: R rows, P prompt positions, n tokens that are not padding, K kv heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gemmakit.pytorch.cache import Cache
from gemmakit.pytorch.decode.step import forward
from gemmakit.pytorch.masks import MIN_SEGMENT, segments_pay

# Less padding than this is run along: laying out costs a few passes over keys and values.
WORTH_PADDING = 0.1
IMPLEMENTATIONS = (None, "sdpa", "flash_attention_2")


class Unpacking(Cache):
    """Takes keys and values of rows laid end to end, and appends them to a cache where the padded rows have them."""

    packs = True

    def __init__(self, cache: Cache, mask: Tensor):
        """mask: bool (R, P), False on padding."""
        super().__init__()
        self._cache, self._shape = cache, mask.shape
        self._tokens = mask.flatten().nonzero().flatten()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(1, K, n, H) each, which come back as they are: nothing else is to be seen."""
        self._cache.update(self._padded(key_states), self._padded(value_states), layer_idx)
        return key_states, value_states

    def _padded(self, x: Tensor) -> Tensor:
        """(1, K, n, H) -> (R, K, P, H), zero on padding."""
        R, P = self._shape
        _, K, _, H = x.shape
        out = x.new_zeros(R * P, K, H).index_copy_(0, self._tokens.to(x.device), x[0].transpose(0, 1))
        return out.view(R, P, K, H).transpose(1, 2)

    def span(self, queries: int, cache_position: Tensor | None = None) -> tuple[int, int]:
        return 0, queries


def pays(model: Any, mask: Tensor) -> bool:
    """Whether to run these prompts without their padding. mask: bool (R, P)."""
    config = model.config
    if config.attn_implementation not in IMPLEMENTATIONS or config.use_bidirectional_attention:
        return False
    tokens = int(mask.sum())
    few_enough = tokens <= (1 - WORTH_PADDING) * mask.numel()
    return few_enough and segments_pay(len(mask), tokens) and tokens >= 2 * MIN_SEGMENT


def prefill(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None) -> Any:
    """Run prompts (R, P), padded on the left, into a cache; logits (R, 1, V) of the last position of each."""
    last = mask.sum(-1).cumsum(0) - 1
    laid_out = None if cache is None else Unpacking(cache, mask)
    out = forward(model, ids[mask][None], laid_out, positions=positions[mask][None], keep=last)
    out.logits = out.logits[0][:, None]
    out.past_key_values = cache
    return out
