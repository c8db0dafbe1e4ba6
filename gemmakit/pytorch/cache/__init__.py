"""Caches of keys and values: growing, static, offloaded, quantized, paged; and their files."""

from gemmakit.pytorch.cache.core import Cache, CacheLayer, DynamicCache, StaticCache
from gemmakit.pytorch.cache.kinds import KINDS, new_cache
from gemmakit.pytorch.cache.offloaded import OffloadedCache
from gemmakit.pytorch.cache.quantized import QuantizedCache

__all__ = [
    "KINDS",
    "Cache",
    "CacheLayer",
    "DynamicCache",
    "OffloadedCache",
    "QuantizedCache",
    "StaticCache",
    "new_cache",
]
