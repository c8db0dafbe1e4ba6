"""What the loader asks of a quantization scheme, and how it finds the right one.

A scheme is one class with the methods of `Quantizer`. The loader stays one: it names what is missing, extra or of
another shape, whatever the scheme, and hands each weight to it one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gemmakit.checkpoint import Checkpoint
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, ConfigError, InputError
from gemmakit.quantization import BitsAndBytesConfig

# {part: tensor name in the file}; the part "weight" is the packed weight itself.
Parts = dict[str, str]


class Quantizer(Protocol):
    """One scheme: which linear layers, how a weight becomes a module, how stored tensors do, what is written down."""

    config: Any
    bits: int
    stored: bool  # the checkpoint's weights are quantized already

    def require(self, device: torch.device) -> None:
        """Raise MissingDependency or InputError if this cannot run on `device`."""
        ...

    def takes(self, name: str) -> bool:
        """Whether the linear layer of this name is to be quantized when its weight is stored plainly."""
        ...

    def parts(self, key: str, checkpoint: Checkpoint) -> Parts:
        """The tensors that together hold the weight stored as `key`; empty if it is stored plainly."""
        ...

    def shape(self, parts: Parts, checkpoint: Checkpoint) -> tuple[int, ...]:
        """The weight's shape once unpacked; CheckpointError if the parts do not fit each other."""
        ...

    def from_float(self, linear: nn.Linear, weight: Tensor, device: torch.device) -> nn.Module:
        """The module that replaces `linear`, with `weight` (O, I) quantized on `device`."""
        ...

    def from_parts(self, linear: nn.Linear, tensors: Mapping[str, Tensor], device: torch.device) -> nn.Module:
        """The module that replaces `linear`, from the stored tensors of `parts`."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """config.json's quantization_config."""
        ...


def choose(config: GemmaConfig, asked: Any, heads: tuple[str, ...], device_map: Any = None) -> Quantizer | None:
    """The scheme of a checkpoint or of the call, or None.

    Args:
        config: the model's; `quantization_config` in it says that the stored weights are quantized.
        asked: the call's quantization_config. For weights that are quantized already the layout is the file's, and
            the call decides how to compute.
        heads: prefixes of modules that are never quantized.
        device_map: the call's, of which the configuration may exempt modules in CPU memory.
    """
    stored = config.extra.get("quantization_config")
    if stored is None and asked is None:
        return None
    from gemmakit.pytorch.quantize.bitsandbytes import BitsAndBytesQuantizer

    wanted = None if asked is None else _parsed(asked)
    if stored is not None:
        try:
            wanted = _merged(_parsed(stored), wanted)
        except ConfigError as e:
            raise CheckpointError(f"{config.name_or_path or 'config.json'} holds quantized weights: {e}") from e
    assert wanted is not None
    wanted.validate()
    if not wanted.is_quantizable:
        raise InputError("quantization_config asks for nothing: set load_in_4bit=True or load_in_8bit=True.")
    kept = _offloaded(device_map) if wanted.llm_int8_enable_fp32_cpu_offload else ()
    return BitsAndBytesQuantizer(wanted, heads, kept, stored is not None)


def _offloaded(device_map: Any) -> tuple[str, ...]:
    """The modules that a map over several places sends to CPU memory or to the disk."""
    if not isinstance(device_map, Mapping) or len({str(place) for place in device_map.values()}) == 1:
        return ()
    return tuple(name for name, place in device_map.items() if str(place) in ("cpu", "disk"))


def _parsed(config: Any) -> BitsAndBytesConfig:
    """A copy, whether it is ours, a dictionary, or the object of another library with to_dict."""
    to_dict = getattr(config, "to_dict", None)
    return BitsAndBytesConfig.from_dict(config if to_dict is None else to_dict())


def _merged(stored: BitsAndBytesConfig, asked: BitsAndBytesConfig | None) -> BitsAndBytesConfig:
    if asked is not None:
        if (stored.load_in_4bit, stored.load_in_8bit) != (asked.load_in_4bit, asked.load_in_8bit):
            kind = "4" if stored.load_in_4bit else "8"
            raise InputError(
                f"the checkpoint holds {kind}-bit weights and quantization_config asks for others: leave it out, or "
                "load the checkpoint they were made from."
            )
        stored.bnb_4bit_compute_dtype = asked.bnb_4bit_compute_dtype
        stored.llm_int8_threshold = asked.llm_int8_threshold
    return stored


def stored_groups(
    quantizer: Quantizer | None, model: nn.Module, checkpoint: Checkpoint, stored: Mapping[str, str]
) -> dict[str, Parts]:
    """{parameter name: its parts} for every linear weight of `stored` that the file holds quantized."""
    if quantizer is None:
        return {}
    weights = {n: k for n, k in stored.items() if isinstance(_owner(model, n), nn.Linear) and n.endswith(".weight")}
    groups = {name: parts for name, key in weights.items() if (parts := quantizer.parts(key, checkpoint))}
    if quantizer.stored and not groups and not any(map(quantizer.takes, (n.rpartition(".")[0] for n in weights))):
        raise CheckpointError(
            f"{checkpoint.files[0].parent} holds no quantized weights, though its config.json has a "
            "quantization_config: take that out, or quantize the weights again."
        )
    return groups


def adopt(
    quantizer: Quantizer | None,
    model: nn.Module,
    name: str,
    tensor: Tensor | Mapping[str, Tensor],
    device: torch.device,
) -> bool:
    """Replace the linear layer that owns the weight `name` by its quantized form, if it is to have one.

    tensor: the plain weight, or the tensors of its parts.
    """
    owner, _, attribute = name.rpartition(".")
    linear = model.get_submodule(owner)
    if quantizer is None or attribute != "weight" or not isinstance(linear, nn.Linear):
        return False
    if isinstance(tensor, Mapping):
        module = quantizer.from_parts(linear, tensor, device)
    elif quantizer.takes(owner):
        module = quantizer.from_float(linear, tensor, device)
    else:
        return False
    module.bias = linear.bias
    model.set_submodule(owner, module.train(linear.training))
    return True


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
