"""What transformers' caches offer under names of their own.

Axis letters: B batch, K kv heads, T positions held, H head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class CacheNames:
    """Mixed into Cache."""

    layers: list[Any]
    max_cache_len: int | None
    mask: Tensor | None
    lag: Tensor | None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise NotImplementedError

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError

    @property
    def key_cache(self) -> list[Tensor | None]:
        """The keys of each layer, (B, K, T, H)."""
        return [layer.keys for layer in self.layers]

    @property
    def value_cache(self) -> list[Tensor | None]:
        """The values of each layer, (B, K, T, H)."""
        return [layer.values for layer in self.layers]

    @property
    def is_initialized(self) -> bool:
        """Whether every layer has its memory."""
        return bool(self.layers) and all(layer.shape is not None for layer in self.layers)

    @property
    def is_compileable(self) -> bool:
        """Whether its shapes stay the same from step to step."""
        return self.max_cache_len is not None

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that so many more queries see, and where the first of them stands."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def batch_split(self, full_batch_size: int, split_size: int) -> list[Self]:
        """Caches of `split_size` rows each, the last of what is left."""
        parts = []
        for start in range(0, full_batch_size, split_size):
            part = copy.deepcopy(self)
            part.batch_select_indices(torch.arange(start, min(start + split_size, full_batch_size)))
            parts.append(part)
        return parts

    @classmethod
    def from_batch_splits(cls, splits: Sequence[Any], **kwargs: Any) -> Any:
        """One cache of the rows of several of equal length, in their order."""
        made = cls(**kwargs)
        for layers in zip(*splits, strict=True):
            keys, values = (torch.cat(parts) for parts in zip(*layers, strict=True))
            made.update(keys, values, len(made.layers))  # type: ignore[attr-defined]
        rows = [len(split[0][0]) for split in splits]
        held = splits[0].get_seq_length()
        if any(split.mask is not None for split in splits):
            masks = [split.padding_mask(held, n) for split, n in zip(splits, rows, strict=True)]
            made.mask = torch.cat([
                torch.ones((n, held), dtype=torch.bool) if mask is None else mask
                for mask, n in zip(masks, rows, strict=True)
            ])  # fmt: skip
        if any(split.lag is not None for split in splits):
            lags = [torch.zeros((n, 1), dtype=torch.long) if s.lag is None else s.lag.expand(n, 1)
                    for s, n in zip(splits, rows, strict=True)]  # fmt: skip
            made.lag = torch.cat(lags)
        return made
