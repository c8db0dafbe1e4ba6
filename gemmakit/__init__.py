"""gemmakit runs Google's Gemma.

Names load when they are first used: importing the package loads neither torch nor jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it
_HOME = {
    "GemmaConfig": "gemmakit.config",
    "GenerationConfig": "gemmakit.generation",
    "GemmaTokenizer": "gemmakit.text",
    "GemmaTokenizerFast": "gemmakit.text",
    "GemmaModel": "gemmakit.pytorch.model",
    "GemmaForCausalLM": "gemmakit.pytorch.model",
    "GemmaPreTrainedModel": "gemmakit.pytorch.pretrained",
    "Cache": "gemmakit.pytorch.cache",
    "DynamicCache": "gemmakit.pytorch.cache",
    "StaticCache": "gemmakit.pytorch.cache",
    "TextStreamer": "gemmakit.streamers",
    "TextIteratorStreamer": "gemmakit.streamers",
    "AsyncTextIteratorStreamer": "gemmakit.streamers",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemmakit' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from gemmakit.config import GemmaConfig
    from gemmakit.generation import GenerationConfig
    from gemmakit.pytorch.cache import Cache, DynamicCache, StaticCache
    from gemmakit.pytorch.model import GemmaForCausalLM, GemmaModel
    from gemmakit.pytorch.pretrained import GemmaPreTrainedModel
    from gemmakit.streamers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer
    from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast
