"""A cache that keeps older tokens in 8 or 4 bits and the newest ones as they are.

Axis letters: B batch, K kv heads, T positions held, H head_dim, G members of a group that shares a scale.
Source: arXiv:2402.02750: a few features of the keys are large at every position, so keys share scales along positions,
a feature each; values have no such features and share them along features, a position each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemmakit.checks import Whole, check
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.pytorch.cache.core import CacheLayer, DynamicCache
from gemmakit.pytorch.shapes import Float, Int

POSITIONS, FEATURES = -2, -1


@dataclass(frozen=True)
class PackedKV:
    """Numbers in groups, each group with its own scale and lowest value.

    data: uint8 (B, K, T, H), or (B, K, T, H / 2) with two 4-bit numbers a byte. scale, low: float32, one a group:
    (B, K, T / G, 1, H) where groups go along POSITIONS, (B, K, T, H / G, 1) along FEATURES.
    """

    data: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    along: int

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedKV:
        return replace(self, data=change(self.data), scale=change(self.scale), low=change(self.low))

    def joined(self, more: PackedKV) -> PackedKV:
        """The positions of `more` after these."""
        pairs = ((getattr(self, n), getattr(more, n)) for n in ("data", "scale", "low"))
        data, scale, low = (torch.cat(pair, dim=2) for pair in pairs)
        return replace(self, data=data, scale=scale, low=low)

    def slice(self, start: int, end: int) -> PackedKV:
        """Positions start..end, whole groups."""
        rows = self.data.shape[2] // self.scale.shape[2]  # positions a row of scales
        a, b = start // rows, end // rows
        scale, low = self.scale[:, :, a:b].clone(), self.low[:, :, a:b].clone()
        return replace(self, data=self.data[:, :, start:end].clone(), scale=scale, low=low)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + self.low.nbytes


def pack(x: Float[Tensor, "B K T H"], bits: int, group: int, along: int) -> PackedKV:
    """x: (B, K, T, H); `group` divides T or H, whichever axis `along` names."""
    grouped = x.float().unflatten(along, (-1, group))
    low, high = grouped.aminmax(dim=along, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    data = ((grouped - low) / scale).round().to(torch.uint8).view(x.shape)
    if bits == 4:
        first, second = data.chunk(2, dim=-1)
        data = first | (second << 4)
    return PackedKV(data, scale, low, bits, along)


def unpack(packed: PackedKV, dtype: torch.dtype) -> Float[Tensor, "B K T H"]:
    """(B, K, T, H) in `dtype`, before its rounding off from what was packed by half a scale at most."""
    data = packed.data
    if packed.bits == 4:
        data = torch.cat((data & 15, data >> 4), dim=-1)
    groups = packed.scale.shape[3 if packed.along == FEATURES else 2]
    grouped = data.unflatten(packed.along, (groups, -1))
    return torch.addcmul(packed.low, grouped.float(), packed.scale).to(dtype).view(data.shape)


class QuantizedLayer(CacheLayer):
    """PackedKV whole groups of older positions; CacheLayer's own buffers hold the newest, without spare room."""

    def __init__(self, bits: int, group: int, recent: int):
        super().__init__(None)
        self.bits, self.group, self.recent = bits, group, recent
        self.older: tuple[PackedKV, PackedKV] | None = None

    @property
    def keys(self) -> Float[Tensor, "B K T H"] | None:
        return None if self._keys is None else self._whole(0, self._keys)

    @property
    def values(self) -> Float[Tensor, "B K T H"] | None:
        return None if self._values is None else self._whole(1, self._values)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.older is None else sum(p.nbytes for p in self.older))

    def _whole(self, which: int, newest: Float[Tensor, "B K _ H"]) -> Float[Tensor, "B K T H"]:
        if self.older is None:
            return newest
        return torch.cat((unpack(self.older[which], newest.dtype), newest), dim=2)

    def append(
        self, k: Float[Tensor, "B K S H"], v: Float[Tensor, "B K S H"], places: Int[Tensor, " S"] | None
    ) -> tuple[Float[Tensor, "B K T H"], Float[Tensor, "B K T H"]]:
        """Give everything held, older positions unpacked for this call; the given tensors come back exact."""
        if torch.is_grad_enabled() and k.requires_grad:
            raise InputError("a quantized cache keeps no gradients: use DynamicCache, or torch.no_grad().")
        if self._keys is not None and self._values is not None:
            k, v = torch.cat((self._keys, k), dim=2), torch.cat((self._values, v), dim=2)
        whole = self._whole(0, k), self._whole(1, v)
        self._settle(k.detach(), v.detach())
        return whole

    def _settle(self, k: Float[Tensor, "B K T H"], v: Float[Tensor, "B K T H"]) -> None:
        """Pack whole groups of what is older than the newest `recent` positions."""
        surplus = max(k.shape[2] - self.recent, 0) // self.group * self.group
        if surplus:
            H = v.shape[3]
            group = self.group if H % self.group == 0 else H
            more = (
                pack(k[:, :, :surplus], self.bits, self.group, POSITIONS),
                pack(v[:, :, :surplus], self.bits, group, FEATURES),
            )
            self.older = more if self.older is None else (self.older[0].joined(more[0]), self.older[1].joined(more[1]))
        # A copy: a slice would keep the memory of what was just packed.
        self._keys, self._values = k[:, :, surplus:].clone(), v[:, :, surplus:].clone()
        self.length = self._packed_positions() + self._keys.shape[2]

    def _packed_positions(self) -> int:
        return 0 if self.older is None else self.older[0].data.shape[2]

    def crop(self, length: int) -> None:
        """As CacheLayer; a group that is cut through is unpacked."""
        if self._keys is None or self._values is None:
            return
        packed = self._packed_positions()
        if self.older is None or length >= packed:
            end = max(length - packed, 0)
            self._keys, self._values = self._keys[:, :, :end], self._values[:, :, :end]
        else:
            kept = length // self.group * self.group
            cut = [unpack(p.slice(kept, kept + self.group), self._keys.dtype) for p in self.older]
            self._keys, self._values = (t[:, :, : length - kept] for t in cut)
            self.older = (self.older[0].slice(0, kept), self.older[1].slice(0, kept)) if kept else None
        self.length = length

    def rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        super().rebatch(change)
        if self.older is not None:
            self.older = (self.older[0].map(change), self.older[1].map(change))


class QuantizedCache(DynamicCache):
    """Older keys and values in `nbits` bits: long contexts in less memory, for a little accuracy and speed.

    Memory a number: nbits / 8 bytes, and 8 / group bytes for the float32 scale and lowest value of its group (a value
    group is head_dim where `q_group_size` does not divide it). With the defaults and head_dim 256 that is 0.625 bytes,
    3.2 times less than bfloat16; 8 bits take 1.125 bytes, 1.8 times less. The newest `residual_length` positions (up
    to `q_group_size` more, until a group is full) stay as they are. `nbytes` counts all of it. Each call unpacks one
    layer at a time, so that the older positions of one layer exist in full meanwhile. A prompt's own pass sees its
    exact keys and values. Inference only: InputError where a gradient is wanted.

    Args:
        ddp_cache_data: (keys, values) of each layer to start from.
        nbits: 4 or 8.
        q_group_size: positions (keys) or features (values) that share a scale.
        residual_length: newest positions kept exact.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[Tensor, Tensor]] | None = None,
        config: GemmaConfig | None = None,
        *,
        nbits: int = 4,
        q_group_size: int = 64,
        residual_length: int = 128,
    ):
        if nbits not in (4, 8):
            raise InputError(f"nbits is {nbits!r}; a quantized cache has 4 or 8.")
        for name, value, low in (("q_group_size", q_group_size, 1), ("residual_length", residual_length, 0)):
            check(name, value, Whole(low), InputError)
        self.nbits, self.q_group_size, self.residual_length = nbits, q_group_size, residual_length
        super().__init__(ddp_cache_data, config)

    def _new_layer(self) -> QuantizedLayer:
        return QuantizedLayer(self.nbits, self.q_group_size, self.residual_length)
