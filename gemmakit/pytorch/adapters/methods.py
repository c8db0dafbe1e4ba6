"""An adapter by the methods that transformers' models have for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from gemmakit.checks import Accepted, take_accepted
from gemmakit.errors import InputError
from gemmakit.pytorch.adapters.config import LoraConfig
from gemmakit.pytorch.adapters.files import load_adapter
from gemmakit.pytorch.adapters.place import adapters_of, add_adapter

_ONE = "a model has one adapter here, without a name; peft.get_peft_model has several"
_LOADING: Accepted = {
    "adapter_name": ((None, "default"), _ONE),
    "revision": ((None,), "download the adapter first, and give its folder"),
    "token": ((None,), "download the adapter first, and give its folder"),
    "device_map": ((None, "auto"), "an adapter stands where its model does"),
    "max_memory": ((None,), "an adapter stands where its model does"),
    "offload_folder": ((None,), "an adapter stands where its model does"),
    "offload_index": ((None,), "an adapter stands where its model does"),
    "peft_config": ((None,), "adapter_config.json of the folder says what the adapter is"),
    "adapter_state_dict": ((None,), "give the folder that holds the adapter"),
    "low_cpu_mem_usage": (None, ""),
    "hotswap": ((None, False, "auto"), "load the model again for another adapter"),
    "adapter_kwargs": ((None, {}), "give the folder that holds the adapter"),
}


class AdapterMethods(nn.Module):
    """Mixed into GemmaPreTrainedModel: `gemmakit.pytorch.adapters` has the rest, which saves and merges."""

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """What transformers' Trainer asks before it trains quantized weights."""
        return bool(adapters_of(self))

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Put a fresh adapter around the model's modules and freeze the rest.

        adapter_config: a LoraConfig of `gemmakit.pytorch.adapters`, or one of peft's. Raises InputError for what is no
        LoRA, or more than one adapter.
        """
        take_accepted({"adapter_name": adapter_name}, _LOADING, InputError)
        if not isinstance(adapter_config, LoraConfig):
            adapter_config = LoraConfig.from_dict(_plain(adapter_config), type(adapter_config).__name__)
        add_adapter(self, adapter_config)  # pyright: ignore[reportArgumentType]

    def load_adapter(
        self, peft_model_id: str | os.PathLike[str], adapter_name: str | None = None, is_trainable: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Put the adapter of a folder around the modules, frozen unless is_trainable. Errors: as `load_adapter`."""
        take_accepted({"adapter_name": adapter_name, **kwargs}, _LOADING, InputError)
        if unknown := kwargs.keys() - _LOADING.keys():
            raise InputError(f"load_adapter has no argument {', '.join(sorted(unknown))}.")
        load_adapter(self, peft_model_id)  # pyright: ignore[reportArgumentType]
        for adapter in adapters_of(self).values():
            for parameter in adapter.own().values():
                parameter.requires_grad_(is_trainable)


def _plain(config: Any) -> Mapping[str, Any]:
    """A configuration of peft's as its file holds it."""
    if not hasattr(config, "to_dict"):
        raise InputError(f"adapter_config is a {type(config).__name__}; give a LoraConfig, gemmakit's or peft's.")
    plain = lambda value: sorted(value) if isinstance(value, set) else getattr(value, "value", value)  # noqa: E731
    return {name: plain(value) for name, value in config.to_dict().items()}
