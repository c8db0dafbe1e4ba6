"""Caches of keys and values by name, as `cache_implementation` asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.pytorch.cache.core import Cache, CacheLayer, DynamicCache, StaticCache, cache_of, counted_positions
from gemmakit.pytorch.cache.offloaded import OffloadedCache
from gemmakit.pytorch.cache.quantized import QuantizedCache
from gemmakit.pytorch.cache.window import WindowCache

__all__ = [
    "KINDS",
    "Cache",
    "CacheLayer",
    "DynamicCache",
    "OffloadedCache",
    "QuantizedCache",
    "StaticCache",
    "WindowCache",
    "cache_of",
    "counted_positions",
    "new_cache",
]

_GROWING = ("dynamic", "hybrid", "hybrid_chunked", "sliding_window")
# Each is called with the configuration, the number of tokens that will come, and the caller's own settings.
KINDS: dict[str, Callable[..., Cache]] = {
    # What a window hides is let go of by any that grows; the other names are transformers', in files of Gemma 2 and 3.
    **dict.fromkeys(_GROWING, lambda config, length, **more: DynamicCache(config=config, **more)),
    "static": lambda config, length, **more: StaticCache(config, max_cache_len=length, **more),
    "offloaded": lambda config, length, **more: OffloadedCache(config=config, **more),
    "offloaded_static": lambda config, length, **more: OffloadedCache(config=config, max_cache_len=length, **more),
    "quantized": lambda config, length, **more: QuantizedCache(config=config, **more),
}
# Names that other libraries' cache_config has and that say nothing here.
_MEANINGLESS = ("backend", "axis_key", "axis_value", "compute_dtype", "device")


def new_cache(
    kind: str | None,
    config: GemmaConfig,
    length: int | None = None,
    settings: dict[str, Any] | None = None,
    forgets: bool = False,
) -> Cache:
    """An empty cache.

    Args:
        kind: one of KINDS; None is "dynamic".
        length: tokens it must hold, for the static ones.
        settings: its own arguments, for instance `{"nbits": 8}` for "quantized".
        forgets: whether a growing one may let go of what windows hide, where `length` tokens pass them.

    Raises:
        InputError: no such kind, or no such setting.
    """
    kind = kind or "dynamic"
    if kind not in KINDS:
        raise InputError(f"there is no cache {kind!r}; the caches are {', '.join(KINDS)}.")
    if forgets and kind in _GROWING and WindowCache.pays(config, length or 0):
        return WindowCache(config)
    own = {name: value for name, value in (settings or {}).items() if name not in _MEANINGLESS}
    try:
        return KINDS[kind](config, length, **own)
    except TypeError as e:
        raise InputError(f"a {kind} cache does not take {', '.join(map(repr, own))} ({e}).") from e
