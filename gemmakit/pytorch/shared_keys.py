"""Keys and values that several layers of a forward pass read. Axis letters: B batch, K kv heads, T keys, H head_dim."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from gemmakit.pytorch.shapes import Float


class KeyBuffers(NamedTuple):
    """Where native kernels find keys and values: this pass's at start..end; `forgotten` older ones are held no more."""

    keys: Float[Tensor, "B K capacity H"]
    values: Float[Tensor, "B K capacity H"]
    start: int
    end: int
    forgotten: int


class SharedKeys:
    """Keys and values of one forward pass that later layers read too, as the layer that made them saw them.

    sources: the layers whose keys and values others read. buffers: by layer, of those whose attention was native.
    """

    def __init__(self, sources: Collection[int]):
        self.sources = sources
        self.buffers: dict[int, KeyBuffers] = {}
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def hold(self, layer_idx: int, k: Float[Tensor, "B K T H"], v: Float[Tensor, "B K T H"]) -> None:
        if layer_idx in self.sources:
            self._held[layer_idx] = k, v

    def hold_buffers(self, layer_idx: int, found: KeyBuffers) -> None:
        if layer_idx in self.sources:
            self.buffers[layer_idx] = found
            self._held[layer_idx] = found.keys[:, :, : found.end], found.values[:, :, : found.end]

    def of(self, layer_idx: int, device: torch.device) -> tuple[Float[Tensor, "B K T H"], Float[Tensor, "B K T H"]]:
        """On `device`, to which they are moved once."""
        k, v = self._held[layer_idx]
        if k.device != device:
            k, v = self._held[layer_idx] = k.to(device), v.to(device)
        return k, v
