"""How the loader finds a checkpoint's quantization scheme, and puts quantized modules in place of plain ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.checkpoint import Checkpoint
from gemmakit.checkpoint.layout import EXPERT_MATRICES, as_matrix
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, ConfigError, InputError
from gemmakit.pytorch.experts import GemmaExperts
from gemmakit.pytorch.quantize.bitsandbytes import BitsAndBytesQuantizer
from gemmakit.pytorch.quantize.own import WeightOnlyQuantizer
from gemmakit.pytorch.quantize.quantizer import PartNames, Quantizer
from gemmakit.quantization import BitsAndBytesConfig, WeightOnlyConfig, named, parse_quantization

QuantizationConfig = BitsAndBytesConfig | WeightOnlyConfig


def quantizer_for(
    config: GemmaConfig, asked: Any, heads: tuple[str, ...], device_map: Any = None, stored: Any = None
) -> Quantizer | None:
    """The scheme of a checkpoint or of the call, or None.

    Args:
        config: the model's; `quantization_config` in it says that the stored weights are quantized.
        asked: the call's quantization_config. For weights that are quantized already the layout is the file's, and
            the call decides how to compute.
        heads: prefixes of modules that are never quantized.
        device_map: the call's, of which the configuration may exempt modules in CPU memory.
        stored: how a GGUF file's weights are quantized, which no config.json says.
    """
    stored = stored or config.extra.get("quantization_config")
    if stored is None and asked is None:
        return None
    wanted = None if asked is None else parse_quantization(asked)
    if stored is not None:
        try:
            wanted = _merged(parse_quantization(stored), wanted)
        except ConfigError as e:
            raise CheckpointError(f"{config.name_or_path or 'config.json'} holds quantized weights: {e}") from e
    assert wanted is not None
    wanted.validate()
    if config.enable_moe_block and not isinstance(wanted, WeightOnlyConfig):
        raise InputError(
            f"the model has {config.num_experts} experts in each layer, which hold most of its weights, in one tensor "
            f"that {wanted.quant_method} does not round: take WeightOnlyConfig(bits={_kind(wanted)[1] or 8})."
        )
    if isinstance(wanted, WeightOnlyConfig):
        return WeightOnlyQuantizer(wanted, config.tie_word_embeddings, stored is not None)
    if not wanted.is_quantizable:
        raise InputError("quantization_config asks for nothing: set load_in_4bit=True or load_in_8bit=True.")
    kept = _offloaded(device_map) if wanted.llm_int8_enable_fp32_cpu_offload else ()
    return BitsAndBytesQuantizer(wanted, heads, kept, stored is not None)


def _offloaded(device_map: Any) -> tuple[str, ...]:
    """The modules that a map over several places sends to CPU memory or to the disk."""
    if not isinstance(device_map, Mapping) or len({str(place) for place in device_map.values()}) == 1:
        return ()
    return tuple(name for name, place in device_map.items() if str(place) in ("cpu", "disk"))


def _merged(stored: QuantizationConfig, asked: QuantizationConfig | None) -> QuantizationConfig:
    """The stored layout, and from the call how to compute."""
    if asked is None:
        return stored
    if _kind(stored) != _kind(asked):
        raise InputError(
            f"the checkpoint holds {_kind(stored)[1]}-bit weights of {stored.quant_method} and quantization_config "
            "asks for others: leave it out, or load the checkpoint they were made from."
        )
    if isinstance(stored, BitsAndBytesConfig) and isinstance(asked, BitsAndBytesConfig):
        stored.bnb_4bit_compute_dtype = asked.bnb_4bit_compute_dtype
        stored.llm_int8_threshold = asked.llm_int8_threshold
    if isinstance(stored, WeightOnlyConfig) and isinstance(asked, WeightOnlyConfig):
        stored.activation_bits = asked.activation_bits
        stored.decode_activation_bits = asked.decode_activation_bits
    return stored


def _kind(config: QuantizationConfig) -> tuple[Any, ...]:
    """What of a configuration decides how weights are stored; the bits come second."""
    if isinstance(config, WeightOnlyConfig):
        return config.quant_method, config.bits, config.group_size, config.head_bits, config.module_formats
    return config.quant_method, 4 if config.load_in_4bit else 8 if config.load_in_8bit else 0


def stored_parts(
    quantizer: Quantizer | None, model: nn.Module, checkpoint: Checkpoint, stored: Mapping[str, str]
) -> dict[str, PartNames]:
    """{parameter name: its parts} for every weight of `stored` that the file holds quantized."""
    if quantizer is None:
        return {}
    weights = {name: key for name, key in stored.items() if is_taken(model, name, quantizer)}
    require_known(quantizer.config, [name.removesuffix(".weight") for name in weights])
    groups = {name: parts for name, key in weights.items() if (parts := quantizer.parts(key, checkpoint))}
    if quantizer.stored and not groups and not any(map(quantizer.takes, (n.removesuffix(".weight") for n in weights))):
        raise CheckpointError(
            f"{checkpoint.files[0].parent} holds no quantized weights, though its config.json has a "
            "quantization_config: take that out, or quantize the weights again."
        )
    return groups


def require_known(config: QuantizationConfig, modules: list[str]) -> None:
    """Raise ConfigError for a name in `module_formats` that none of the modules has."""
    for kind, names in (getattr(config, "module_formats", None) or {}).items():
        for name in names:
            if not any(named(module, [name]) for module in modules):
                raise ConfigError(f"module_formats has {kind} for {name!r}, which names no weight of this model.")


def unpacked_shapes(
    quantizer: Quantizer | None,
    wanted: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, PartNames],
    checkpoint: Checkpoint,
) -> dict[str, tuple[int, ...]]:
    """The checkpoint's shapes by name, of quantized weights those that they stand for, without their other parts."""
    if quantizer is None:
        return checkpoint.shapes()
    parts = {key for group in groups.values() for part, key in group.items() if part != "weight"}
    shapes = {name: shape for name, shape in checkpoint.shapes().items() if name not in parts}
    for name, group in groups.items():
        found = quantizer.shape(name.removesuffix(".weight"), wanted[name], group, checkpoint)
        shapes[group["weight"]] = wanted[name] if found == as_matrix(wanted[name]) else found
    return shapes


def replace_with_quantized(
    quantizer: Quantizer | None,
    model: nn.Module,
    name: str,
    tensor: Tensor | Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
) -> bool:
    """Replace the module that owns the weight `name` by its quantized form, if it is to have one.

    tensor: the plain weight as it is stored, or the tensors of its parts; dtype: what plain weights are cast to.
    """
    if quantizer is None or not is_taken(model, name, quantizer):
        return False
    owner, matrix = name.rpartition(".")[0], name.removesuffix(".weight")
    old = model.get_submodule(owner)
    if isinstance(tensor, Mapping):
        module = quantizer.from_parts(old, matrix, tensor, device)
    elif quantizer.takes(matrix):
        module = quantizer.from_float(old, matrix, tensor, device, dtype)
    else:
        return False
    if isinstance(old, nn.Linear):
        module.bias = old.bias
    model.set_submodule(owner, module.train(old.training))
    return True


def is_taken(model: nn.Module, name: str, quantizer: Quantizer) -> bool:
    """Whether the parameter is a weight that the scheme can round: of a projection, an embedding, or all experts."""
    owner = model.get_submodule(name.rpartition(".")[0])
    ends = EXPERT_MATRICES if isinstance(owner, GemmaExperts) else (".weight",)
    return isinstance(owner, quantizer.kinds) and name.endswith(ends)
