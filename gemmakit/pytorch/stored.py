"""Which tensors of a model a checkpoint stores, and as what."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.checkpoint.arrays import LazyTensor
from gemmakit.dtypes import dtype_name
from gemmakit.errors import InputError
from gemmakit.pytorch.quantize.modules import TABLES


def stored_tensors(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Any]:
    """All but the tied ones, which loading makes again. Tensors of torchao are stored as the numbers they stand for.

    tensors: by the model's names. tied: {name: the one that it is}. Raises InputError for an adapter, other names, tied
    tensors that differ, and offloaded ones.
    """
    if adapted := next((name for name in tensors if ".base_layer." in name), None):
        raise InputError(
            f"{adapted.partition('.base_layer.')[0]} has an adapter, which a checkpoint of the model has no place for: "
            "gemmakit.pytorch.adapters has save_adapter, which writes it alone, and merge_adapter, which folds it in."
        )
    names = model.state_dict().keys()
    if tensors.keys() - names or names - tensors.keys() - tied.keys():
        other = sorted((tensors.keys() - names) | (names - tensors.keys() - tied.keys()))
        raise InputError(f"state_dict does not have the model's names: {', '.join(other[:4])} on one side only.")
    tied = {**tied, **{name + table: source + table for name, source in tied.items() for table in TABLES}}
    for name, source in tied.items():
        if name in tensors and source in tensors and not _same(tensors[name], tensors[source]):
            raise InputError(
                f"{name} differs from {source}, but the configuration ties them: call untie_weights() before changing "
                "one of them, or tie_weights() to keep the embedding's."
            )
    if any(t.is_meta for t in tensors.values()):
        raise InputError("some weights are offloaded: load the model without offloading to save it.")
    kept = {name: tensor for name, tensor in tensors.items() if name not in tied}
    coded = [name for name, tensor in kept.items() if _is_coded(tensor)]
    if coded:
        warnings.warn(
            f"{len(coded)} weights are {type(kept[coded[0]]).__name__} of another library, which no reader of "
            f"checkpoints knows ({coded[0]}, ...): they are stored as the numbers they stand for. quantization_config= "
            "of from_pretrained quantizes to what is stored as it is.",
            stacklevel=3,
        )
    return {name: _plain(tensor) if name in coded else tensor for name, tensor in kept.items()}


def _is_coded(tensor: Any) -> bool:
    """Whether a tensor stands for numbers that it does not hold, as torchao's do; one of several processes does not."""
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "full_tensor")


def _plain(tensor: Any) -> LazyTensor:
    return LazyTensor(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.dequantize)


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; of tensors that are made of others, what of these is here."""
    pairs = list(zip_longest(_held(a), _held(b)))
    if a.shape != b.shape or any(x is None or y is None or x.shape != y.shape for x, y in pairs):
        return False
    return all(x.data_ptr() == y.data_ptr() or torch.equal(x, y) for x, y in pairs)


def _held(tensor: Any) -> list[Tensor]:
    """The memory behind a tensor: its own, or of those that it is made of (DTensor, torchao)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor] if isinstance(tensor, Tensor) else []
    return [part for name in tensor.__tensor_flatten__()[0] for part in _held(getattr(tensor, name))]
