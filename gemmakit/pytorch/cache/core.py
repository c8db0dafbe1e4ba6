"""Keys and values of the tokens already seen. A cache owns its memory and its positions; the model asks it to append.

Axis letters: B batch, K kv heads, T positions held, S new ones, H head_dim.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemmakit.checks import Whole, check
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, PromptTooLong
from gemmakit.pytorch.cache.files import load_cache, save_cache
from gemmakit.pytorch.cache.names import CacheNames
from gemmakit.pytorch.shapes import Bool, Float, Int, Shaped

if TYPE_CHECKING:
    from typing_extensions import Self

Legacy = tuple[tuple[Tensor, Tensor], ...]


class Pairs(tuple[tuple[Tensor, Tensor], ...]):
    """The older tuple, with what its cache knows besides: see `Cache.mask` and `Cache.lag`."""

    mask: Tensor | None = None
    lag: Tensor | None = None


def _sizes(x: Float[Tensor, "B K T H"]) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[3]


def on_host(length: int | Tensor) -> int:
    """A length as a number; one of a graph that is traced for every length stays as it is."""
    return int(length) if isinstance(length, Tensor) else length


class CacheLayer:
    """One layer's buffers (B, K, capacity, H), of which the first `length` positions hold something."""

    forgotten = 0  # positions before those of the buffers, held no more

    def __init__(self, capacity: int | None):
        self.fixed = capacity
        self.length: int | Tensor = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._borrowed = False  # the tensors belong to a graph or to the caller: never written to
        # The first layer of a cache, whose length is that of the others where it was told the same places.
        self.first: CacheLayer | None = None
        self.told: Tensor | None = None

    @property
    def keys(self) -> Float[Tensor, "B K T H"] | None:
        return None if self._keys is None else self._keys[:, :, : on_host(self.length)]

    @property
    def values(self) -> Float[Tensor, "B K T H"] | None:
        return None if self._values is None else self._values[:, :, : on_host(self.length)]

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(B, K, H) of what is held; None before the first append."""
        return None if self._keys is None else _sizes(self._keys)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, used or not."""
        return sum(t.nbytes for t in (self._keys, self._values) if t is not None)

    def append(
        self, k: Float[Tensor, "B K S H"], v: Float[Tensor, "B K S H"], places: Int[Tensor, " S"] | None
    ) -> tuple[Float[Tensor, "B K T H"], Float[Tensor, "B K T H"]]:
        """Take S more positions; give all that is held, or with `places` the whole fixed buffer."""
        if places is not None and self.fixed is not None:
            return self._write_at(k, v, places)
        # Even if k needs no gradient: that of a trained q_proj reads the keys of this call.
        if torch.is_grad_enabled():
            start, self.length = self._span(k.shape[2])
            return self._join(k, v, start)
        keys, values, start, end = self.claim(_sizes(k), k.shape[2], k)
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def claim(
        self, sizes: tuple[int, int, int], more: int, like: Tensor
    ) -> tuple[Float[Tensor, "B K capacity H"], Float[Tensor, "B K capacity H"], int, int]:
        """Room for `more` positions, which count as held from now on: the caller writes them, before anyone reads.

        sizes: (B, K, H); like: has dtype and device. Returns the buffers of keys and values, and where
        the new positions start and end in them.
        """
        start, end = self._span(more)
        self._reserve(sizes, like, start, end)
        self.length, self.told = end, None
        assert self._keys is not None and self._values is not None
        return self._keys, self._values, start, end

    def fits(self, x: Tensor) -> bool:
        """Whether what is held has x's dtype and device and lies without gaps, as native kernels write it."""
        keys, values = self._keys, self._values
        if keys is None or values is None:
            return True
        return keys.dtype == x.dtype and keys.device == x.device and keys.is_contiguous() and values.is_contiguous()

    def _span(self, more: int) -> tuple[int, int]:
        """Where `more` positions start and end. Raises PromptTooLong when they do not fit."""
        start = on_host(self.length)
        end = start + more
        if self.fixed is not None and end > self.fixed:
            raise PromptTooLong(
                f"the cache holds {self.fixed} tokens and has {start}; {more} more do not fit. "
                f"Make it with max_cache_len={end} or more."
            )
        return start, end

    def _write_at(
        self, k: Float[Tensor, "B K S H"], v: Float[Tensor, "B K S H"], places: Int[Tensor, " S"]
    ) -> tuple[Float[Tensor, "B K capacity H"], Float[Tensor, "B K capacity H"]]:
        keys, values = self.claim_at(_sizes(k), places, k)
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places, v)
        return keys, values

    def claim_at(
        self, sizes: tuple[int, int, int], places: Int[Tensor, " S"], like: Tensor
    ) -> tuple[Float[Tensor, "B K capacity H"], Float[Tensor, "B K capacity H"]]:
        """As `claim`, of a fixed buffer, for the positions at `places`: no length is read on the host."""
        if self._keys is None or self._borrowed:
            self._reserve(sizes, like, int(self.length), len(places))
        assert self._keys is not None and self._values is not None
        first = self.first
        # Stays on the device: reading it here would wait. One addition a pass, not one a layer.
        self.length = first.length if first is not None and first.told is places else places[-1] + 1
        self.told = places
        return self._keys, self._values

    def _join(
        self, k: Float[Tensor, "B K S H"], v: Float[Tensor, "B K S H"], start: int
    ) -> tuple[Float[Tensor, "B K T H"], Float[Tensor, "B K T H"]]:
        """Gradients forbid writing in place."""
        if start:
            assert self._keys is not None and self._values is not None
            k = torch.cat((self._keys[:, :, :start], k), dim=2)
            v = torch.cat((self._values[:, :, :start], v), dim=2)
        self._keys, self._values, self._borrowed = k, v, True
        return k, v

    def _reserve(self, sizes: tuple[int, int, int], like: Tensor, used: int, end: int) -> None:
        """Make room for `end` positions; a growing buffer takes half as much again, so that copies stay rare."""
        held = 0 if self._keys is None else self._keys.shape[2]
        if self._keys is not None and self._keys.is_inference() and not torch.is_inference_mode_enabled():
            self._borrowed = True  # outside inference mode its tensors can be read, not written
        if held >= end and not self._borrowed:
            return
        self._borrowed = False
        room = self._room(held, end)
        self._keys = self._grown(self._keys, sizes, room, used, like)
        self._values = self._grown(self._values, sizes, room, used, like)

    def _room(self, held: int, end: int) -> int:
        """Positions of a new buffer for `end` of them, after one of `held`."""
        return self.fixed or max(end, min(held + held // 2, held + 4096), 64 if end < 64 else end)

    @staticmethod
    def _grown(
        old: Float[Tensor, "B K held H"] | None, sizes: tuple[int, int, int], room: int, used: int, like: Tensor
    ) -> Float[Tensor, "B K room H"]:
        B, K, H = sizes
        # Zeros, because a masked position still multiplies: 0 * garbage could be NaN.
        new = torch.zeros((B, K, room, H), dtype=like.dtype, device=like.device)
        if old is not None:
            new[:, :, :used] = old[:, :, :used]
        return new

    def check_crop(self, length: int) -> None:
        """Raises InputError where the layer cannot go back to `length` positions."""

    def crop(self, length: int) -> None:
        """Forget all but the first `length` positions, of which there are at least so many."""
        self.length, self.told = length, None

    def rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` (a tensor function along the batch axis) to what is held."""
        if self._keys is None or self._values is None:
            return
        keys, values = change(self._keys), change(self._values)
        if self.fixed is not None and keys.shape == self._keys.shape and not self._borrowed:
            self._keys.copy_(keys)  # a captured graph reads this address
            self._values.copy_(values)
        else:
            self._keys, self._values = keys, values


class Cache(CacheNames):
    """The keys and values of every layer.

    Reads like the older tuple too: `cache[i]` is (keys, values) of layer i, `len(cache)` counts layers.
    """

    max_cache_len: int | None = None
    spare: int | None = None  # of the newest tokens so many can be taken back; None for all
    packed = False  # whether the next pass is one row of many sequences' tokens, of which the cache says who sees whom
    packs = False  # whether what it is given are documents laid end to end, told apart by their positions

    # What the passes that filled it were told, so that whoever goes on does so by the same rule.
    mask: Tensor | None = None  # (B, n), 0 on padding, of the first n positions; what comes after them is none
    lag: Tensor | None = None  # (B or 1, 1): how far the last token's position_ids are behind its place; None for 0

    def __init__(self) -> None:
        self.layers: list[CacheLayer] = []

    # -- what the model asks for -----------------------------------------------------------------------------------

    def update(
        self,
        key_states: Float[Tensor, "B K S H"],
        value_states: Float[Tensor, "B K S H"],
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "B K T H"], Float[Tensor, "B K T H"]]:
        """Append to layer `layer_idx`; give every key and value the queries may look at.

        Raises PromptTooLong when a static cache is full, InputError when the batch changed.
        """
        layer = self.layer_for(layer_idx, _sizes(key_states))
        return layer.append(key_states, value_states, (cache_kwargs or {}).get("cache_position"))

    def layer_for(self, layer_idx: int, sizes: tuple[int, int, int]) -> CacheLayer:
        """The layer, made if it is new, that positions of these sizes (B, K, H) may go to.

        Raises InputError when it holds others.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer())
        layer = self.layers[layer_idx]
        shape = layer.shape
        if shape is not None and shape != sizes:
            self._refuse(shape, sizes)
        return layer

    def _new_layer(self) -> CacheLayer:
        return CacheLayer(self.max_cache_len)

    @staticmethod
    def _refuse(shape: tuple[int, int, int], sizes: tuple[int, int, int]) -> None:
        if shape[0] != sizes[0]:
            raise InputError(
                f"the cache holds {shape[0]} rows and this call has {sizes[0]}: "
                "use batch_repeat_interleave or batch_select_indices, or a fresh cache."
            )
        raise InputError(
            f"the cache holds {shape[1]} heads of {shape[2]} a layer and this model has {sizes[1]} of {sizes[2]}: "
            "the cache is another model's."
        )

    def span(
        self, queries: int, cache_position: Int[Tensor, " S"] | None = None
    ) -> tuple[int | Int[Tensor, " S"], int]:
        """Where the next tokens go, and how many keys they get to see.

        The first is the number of positions before them, or, for a static cache that is told places by a tensor, that
        tensor (S,): no length is read from the device then, and the whole buffer is seen.
        """
        if cache_position is not None and self.max_cache_len is not None:
            return cache_position, self.max_cache_len
        past = self.get_seq_length()
        return past, past + queries

    def note(self, attention_mask: Any, position_ids: Int[Tensor, "#B S"] | None, end: int) -> None:
        """Keep what a pass says of padding and positions. end: positions held after it.

        A mask that is not (B, T) says who sees whom, not what is padding: of such a pass nothing is kept.
        """
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
            return
        self.mask = self.mask if attention_mask is None else attention_mask
        if position_ids is None:
            return
        S = position_ids.shape[1]
        lags = torch.arange(end - S, end, device=position_ids.device) - position_ids
        if attention_mask is None:
            self.lag = lags[:, -1:]
            return
        seen = (attention_mask[:, -S:] != 0).to(lags.device)
        last = (seen * torch.arange(S, device=lags.device)).argmax(-1, keepdim=True)
        known = self.lag is not None and self.lag.shape[0] in (1, len(last))  # other rows are refused when they append
        before = self.lag.to(lags.device) if known and self.lag is not None else torch.zeros_like(last)
        self.lag = torch.where(seen.any(-1, keepdim=True), lags.expand(len(seen), S).gather(1, last), before)

    def next_position(self, past: int, rows: int) -> int | Int[Tensor, "#B 1"]:
        """The position_ids of the token that comes after the first `past`."""
        return past if self.lag is None or self.lag.shape[0] not in (1, rows) else past - self.lag

    def padding_mask(self, past: int, rows: int) -> Bool[Tensor, "B past"] | None:
        """Of the first `past` positions, False on padding; None where nothing is known to be any."""
        if self.mask is None or len(self.mask) != rows:
            return None
        mask = self.mask[:, :past].to(torch.bool)
        return torch.nn.functional.pad(mask, (0, past - mask.shape[1]), value=True)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held."""
        return int(self.layers[layer_idx].length) if layer_idx < len(self.layers) else 0

    def get_max_cache_shape(self) -> int | None:
        """Positions there is room for; None means it grows."""
        return self.max_cache_len

    get_max_length = get_max_cache_shape

    # -- what strategies ask for -----------------------------------------------------------------------------------

    def crop(self, max_length: int) -> None:
        """Forget all but the first `max_length` positions; a negative number forgets that many at the end."""
        held = [int(layer.length) for layer in self.layers]
        lengths = [min(n, max_length) if max_length >= 0 else max(n + max_length, 0) for n in held]
        for layer, length in zip(self.layers, lengths, strict=True):
            layer.check_crop(length)
        if self.lag is not None and self.mask is not None and held:
            self.lag = self.lag - _hidden(self.mask[:, : held[0]]) + _hidden(self.mask[:, : lengths[0]])
        for layer, length in zip(self.layers, lengths, strict=True):
            layer.crop(length)
        if not any(lengths):
            self.mask = self.lag = None

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.mask = self.lag = None
        for layer in self.layers:
            layer.crop(0)

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order; a row may come several times."""
        self._rebatch(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, its copies side by side: (B, ...) becomes (B * repeats, ...)."""
        self._rebatch(lambda x: x.repeat_interleave(repeats, dim=0))

    def _rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.rebatch(change)
        self.mask = None if self.mask is None else change(self.mask)
        self.lag = self.lag if self.lag is None or self.lag.shape[0] == 1 else change(self.lag)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, used or not."""
        return sum(layer.nbytes for layer in self.layers)

    # -- to a file and back ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what is held as one safetensors file: `layers.0.keys`, `layers.0.values`, ..., each (B, K, T, H).

        With them, where they are known, `mask` and `lag`.

        A reader finds the older file or the new one, whole. Raises InputError for an empty cache, CheckpointError when
        the disk refuses.
        """
        save_cache(self.to_legacy_cache(), {"mask": self.mask, "lag": self.lag}, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read a cache that `save` wrote, of whatever kind it was. Raises CheckpointError if the file is none."""
        pairs, known = load_cache(Path(path), device)
        cache = cls.from_legacy_cache(pairs)
        cache.mask, cache.lag = known.get("mask"), known.get("lag")
        return cache

    # -- the older tuple -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        assert layer.keys is not None and layer.values is not None
        return layer.keys, layer.values

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return True  # an empty cache is still a cache

    def to_legacy_cache(self) -> Legacy:
        """((keys, values), ...) a layer, each (B, K, T, H)."""
        pairs = Pairs(self)
        pairs.mask, pairs.lag = self.mask, self.lag
        return pairs

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[tuple[Tensor, Tensor]] | None = None) -> Self:
        """A cache that starts from the tuples; their tensors are not written to."""
        cache = cls()
        for i, (k, v) in enumerate(past_key_values or ()):
            cache.update(k, v, i)
        if isinstance(past_key_values, Pairs):
            cache.mask, cache.lag = past_key_values.mask, past_key_values.lag
        return cache


def _trailing(mask: Shaped[Tensor, "B T"]) -> Int[Tensor, "B 1"]:
    """How many places at the end are padding."""
    places = torch.arange(mask.shape[1] + 1, device=mask.device)
    shown = torch.nn.functional.pad(mask != 0, (1, 0), value=True)
    return mask.shape[1] - (shown * places).amax(-1, keepdim=True)


def _hidden(mask: Shaped[Tensor, "B T"]) -> Int[Tensor, "B 1"]:
    """How many places before the last that is shown are padding."""
    return (mask == 0).sum(-1, keepdim=True) - _trailing(mask)


def counted_positions(mask: Shaped[Tensor, "B T"], cache: Cache | None = None) -> Int[Tensor, "B new"]:
    """position_ids of the places after those that the cache holds: they count what the mask shows.

    They go on where the cache's last token that is shown was, however its positions were made.
    """
    held = 0 if cache is None else cache.get_seq_length()
    counted = (mask[:, held:] != 0).cumsum(-1) - 1
    if cache is not None and held:
        counted = counted + cache.next_position(held, len(mask)) - _trailing(mask[:, :held])
    return counted.clamp_min(0)


def cache_of(value: Any) -> Cache | None:
    """A cache from one, from the older tuple, or from what a cache of transformers holds; None for any other thing."""
    if value is None or isinstance(value, Cache):
        return value
    layers: Any = getattr(value, "layers", None)
    if isinstance(layers, list) and all(hasattr(layer, "keys") and hasattr(layer, "values") for layer in layers):
        value = [(layer.keys, layer.values) for layer in layers if layer.keys is not None]
    return DynamicCache.from_legacy_cache(value) if isinstance(value, tuple | list) else None


class DynamicCache(Cache):
    """Grows as tokens come."""

    def __init__(
        self, ddp_cache_data: Iterable[tuple[Tensor, Tensor]] | None = None, config: GemmaConfig | None = None
    ):
        super().__init__()
        for i, (k, v) in enumerate(ddp_cache_data or ()):
            self.update(k, v, i)


class StaticCache(Cache):
    """Room for `max_cache_len` tokens, taken once: the addresses never change, as captured graphs need.

    With `cache_position` in a call the places come from that tensor and the whole buffer is given back, so that no
    length is read on the host; without it, only what is held is given, and attention does no work on empty places.

    Args:
        config: gives the number of layers and the head sizes.
        max_cache_len: tokens, prompt and new ones together.
        max_batch_size, device, dtype: with all given the memory is taken now, otherwise with the first update.
    """

    def __init__(
        self,
        config: GemmaConfig,
        max_batch_size: int | None = None,
        max_cache_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if max_cache_len is not None:
            check("max_cache_len", max_cache_len, Whole(1), InputError)
        self.max_cache_len = max_cache_len or config.max_position_embeddings
        self.layers = [CacheLayer(self.max_cache_len) for _ in config.kv_layers()]
        for layer in self.layers[1:]:
            layer.first = self.layers[0]
        if max_batch_size is not None and dtype is not None:
            for spec, layer in zip(config.kv_layers(), self.layers, strict=True):
                shape = (max_batch_size, spec.num_key_value_heads, self.max_cache_len, spec.head_dim)
                layer._keys = torch.zeros(shape, dtype=dtype, device=device)
                layer._values = torch.zeros(shape, dtype=dtype, device=device)

    def settle(self, length: int) -> None:
        """Say on the host how many positions are held, after steps that were told places by a tensor."""
        for layer in self.layers:
            layer.crop(length)
