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
from gemmakit.pytorch.cache.core import CacheLayer, DynamicCache
from gemmakit.pytorch.shapes import Float, Int

Pair = tuple[Float[Tensor, "B K T H"], Float[Tensor, "B K T H"]]


def _at_home(device: torch.device) -> bool:
    """Whether keys and values that are wanted on `device` are there already."""
    return device.type == "cpu"


class OffloadedLayer(CacheLayer):
    """The buffers of CacheLayer in CPU memory, and for a while a copy of what they hold on the accelerator."""

    def __init__(self, capacity: int | None):
        super().__init__(capacity)
        self.device = torch.device("cpu")  # of the last append
        self.fetched: Pair | None = None  # (B, K, length, H) each, on that device

    def fetch(self) -> None:
        """Start copying what is held to where it was last used, unless it is there."""
        if self.fetched is None and self.keys is not None and self.values is not None and not _at_home(self.device):
            self.fetched = (
                self.keys.to(self.device, non_blocking=True),
                self.values.to(self.device, non_blocking=True),
            )

    def append(
        self, k: Float[Tensor, "B K S H"], v: Float[Tensor, "B K S H"], places: Int[Tensor, " S"] | None
    ) -> Pair:
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
    def _grown(
        old: Float[Tensor, "B K held H"] | None, sizes: tuple[int, int, int], room: int, used: int, like: Tensor
    ) -> Float[Tensor, "B K room H"]:
        B, K, H = sizes
        new = _host_buffer(B, K, room, H, like.dtype)
        if old is not None:
            new[:, :, :used] = old[:, :, :used]
        return new

    def crop(self, length: int) -> None:
        super().crop(length)
        self.fetched = None

    def rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        super().rebatch(lambda x: _kept(change(x)))
        self.fetched = None


def _kept(x: Float[Tensor, "B K T H"]) -> Float[Tensor, "B K T H"]:
    B, K, T, H = x.shape
    return _host_buffer(B, K, T, H, x.dtype).copy_(x)


def _host_buffer(B: int, K: int, T: int, H: int, dtype: torch.dtype) -> Float[Tensor, "B K T H"]:
    """Zeros (B, K, T, H) in CPU memory, positions outermost there: the first ones then lie together.

    Only such a piece, and only from pinned memory, is copied to an accelerator beside the computation.
    """
    pinned = torch.cuda.is_available()
    return torch.zeros((T, B, K, H), dtype=dtype, device="cpu", pin_memory=pinned).permute(1, 2, 0, 3)


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
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.max_cache_len = max_cache_len
        super().__init__(ddp_cache_data, config)

    def _new_layer(self) -> OffloadedLayer:
        return OffloadedLayer(self.max_cache_len)

    def span(
        self, queries: int, cache_position: Int[Tensor, " S"] | None = None
    ) -> tuple[int | Int[Tensor, " S"], int]:
        """As Cache.span; the length is known on the host, so places by a tensor are not needed."""
        return super().span(queries)

    def update(
        self,
        key_states: Float[Tensor, "B K S H"],
        value_states: Float[Tensor, "B K S H"],
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> Pair:
        """As Cache.update; also sends for the next layer's keys and values, after the last layer the first one's."""
        device = key_states.device
        if layer_idx < len(self.layers):
            self._layer(layer_idx).device = device
            self._send_for(layer_idx)  # nobody has for the first step, and after a crop
        self._arrive(device)
        out = super().update(key_states, value_states, layer_idx, cache_kwargs)
        self._layer(layer_idx).device = device
        if len(self.layers) > 1:
            self._send_for((layer_idx + 1) % len(self.layers))
        return out

    def _layer(self, layer_idx: int) -> OffloadedLayer:
        layer = self.layers[layer_idx]
        assert isinstance(layer, OffloadedLayer)
        return layer

    def _send_for(self, layer_idx: int) -> None:
        layer = self._layer(layer_idx)
        if layer.device.type != "cuda":
            return layer.fetch()
        if layer.device not in self._streams:
            self._streams[layer.device] = torch.cuda.Stream(layer.device)
        with torch.cuda.stream(self._streams[layer.device]):
            return layer.fetch()

    def _arrive(self, device: torch.device) -> None:
        """Computation waits for the copies under way, and their memory is freed in computation's order from now on."""
        if device not in self._streams:
            return
        current = torch.cuda.current_stream(device)
        current.wait_stream(self._streams[device])
        for tensor in self._fetched():
            if tensor.device == device:
                tensor.record_stream(current)

    def _fetched(self) -> list[Tensor]:
        return [t for i in range(len(self.layers)) for t in self._layer(i).fetched or ()]

    @property
    def device_nbytes(self) -> int:
        """Bytes of keys and values on the accelerator now."""
        return sum(t.nbytes for t in self._fetched())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": {}}  # a stream belongs to its process
