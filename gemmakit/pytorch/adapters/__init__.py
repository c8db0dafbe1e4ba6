"""Low-rank adapters: around a model's modules, in and out of PEFT's files, folded into the weights."""

from gemmakit.pytorch.adapters.by_row import load_adapters
from gemmakit.pytorch.adapters.config import ALL_LINEAR, PROJECTIONS, LoraConfig
from gemmakit.pytorch.adapters.files import adapter_to_gguf, base_of, load_adapter, save_adapter
from gemmakit.pytorch.adapters.modules import AdaptedEmbedding, AdaptedLinear, Adapter
from gemmakit.pytorch.adapters.place import adapters_of, add_adapter, merge_adapter, remove_adapter

__all__ = [
    "ALL_LINEAR",
    "PROJECTIONS",
    "AdaptedEmbedding",
    "AdaptedLinear",
    "Adapter",
    "LoraConfig",
    "adapter_to_gguf",
    "adapters_of",
    "add_adapter",
    "base_of",
    "load_adapter",
    "load_adapters",
    "merge_adapter",
    "remove_adapter",
    "save_adapter",
]
