"""A cache whose keys and values live in CPU memory; the accelerator holds those of two layers at most.

Axis letters: B batch, K kv heads, T positions held, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.pytorch.cache import CacheLayer, DynamicCache

Pair = tuple[Tensor, Tensor]


def _at_home(device: torch.device) -> bool:
    """Whether keys and values that are wanted on `device` are there already."""
    return device.type == "cpu"


class OffloadedLayer(CacheLayer):
    """The buffers of CacheLayer in CPU memory, and for a while a copy of what they hold on the accelerator."""

    def __init__(self, capacity: int | None):
        super().__init__(capacity)
        self.fetched: Pair | None = None  # (B, K, length, H) each, on the model's device

    def fetch(self, device: torch.device) -> None:
        """Start copying what is held to `device`, unless it is there."""
        if self.fetched is None and self.keys is not None and self.values is not None and not _at_home(device):
            self.fetched = (self.keys.to(device, non_blocking=True), self.values.to(device, non_blocking=True))

    def append(self, k: Tensor, v: Tensor, places: Tensor | None) -> Pair:
        """As CacheLayer, with the result on the device of `k`; no place for gradients."""
        if torch.is_grad_enabled() and k.requires_grad:
            raise InputError("an offloaded cache keeps no gradients: use DynamicCache, or torch.no_grad().")
        fetched, self.fetched = self.fetched, None
        with torch.no_grad():
            held = super().append(k.to("cpu"), v.to("cpu"), None)
        if _at_home(k.device):
            return held
        if fetched is None:
            return k, v
        return torch.cat((fetched[0], k), dim=2), torch.cat((fetched[1], v), dim=2)

    @staticmethod
    def _grown(old: Tensor | None, like: Tensor, used: int, room: int) -> Tensor:
        new = CacheLayer._grown(old, like, used, room)
        # Only from pinned memory does a copy to the accelerator run beside the computation.
        return new.pin_memory() if torch.cuda.is_available() else new

    def crop(self, length: int) -> None:
        super().crop(length)
        self.fetched = None

    def rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        super().rebatch(change)
        self.fetched = None


class OffloadedCache(DynamicCache):
    """Keys and values in CPU memory: long contexts on a small accelerator, paid for with copies over the bus.

    While layer i computes, the keys and values of layer i + 1 are on their way. Device memory: those of two layers
    instead of all. `nbytes` counts CPU memory, `device_nbytes` what is on the accelerator now. On a CPU model this is
    a DynamicCache. Inference only: InputError where a gradient is wanted.

    Args:
        ddp_cache_data: (keys, values) of each layer to start from.
        max_cache_len: take the CPU memory for so many tokens at once, and hold no more; None grows as tokens come.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[Tensor, Tensor]] | None = None,
        config: GemmaConfig | None = None,
        *,
        max_cache_len: int | None = None,
    ):
        self._stream: torch.cuda.Stream | None = None
        self.max_cache_len = max_cache_len
        super().__init__(ddp_cache_data, config)

    def _new_layer(self) -> OffloadedLayer:
        return OffloadedLayer(self.max_cache_len)

    def span(self, queries: int, cache_position: Tensor | None = None) -> tuple[int | Tensor, int]:
        """As Cache.span; the length is known on the host, so places by a tensor are not needed."""
        return super().span(queries)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> Pair:
        """As Cache.update; also sends for the next layer's keys and values, after the last layer the first one's."""
        device = key_states.device
        if layer_idx < len(self.layers):
            self._send_for(layer_idx, device)  # for the first step, and after a crop
        self._arrive()
        out = super().update(key_states, value_states, layer_idx, cache_kwargs)
        if len(self.layers) > 1:
            self._send_for((layer_idx + 1) % len(self.layers), device)
        return out

    def _send_for(self, layer_idx: int, device: torch.device) -> None:
        layer = self.layers[layer_idx]
        assert isinstance(layer, OffloadedLayer)
        if device.type != "cuda":
            return layer.fetch(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            return layer.fetch(device)

    def _arrive(self) -> None:
        """Computation waits for the copies under way, and their memory is freed in computation's order from now on."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in self._fetched():
            tensor.record_stream(current)

    def _fetched(self) -> list[Tensor]:
        layers = (layer for layer in self.layers if isinstance(layer, OffloadedLayer))
        return [t for layer in layers for t in layer.fetched or ()]

    @property
    def device_nbytes(self) -> int:
        """Bytes of keys and values on the accelerator now."""
        return sum(t.nbytes for t in self._fetched())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}  # a stream belongs to its process
