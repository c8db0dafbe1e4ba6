"""Adapters of other libraries around weights in few bits: what fails there is said in words."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import nn

from gemmakit.errors import InputError
from gemmakit.pytorch.quantize import QuantizedWeight


def explain(layer: nn.Module, number: int, error: RuntimeError) -> None:
    """Raises InputError where `error` is of another library's module in the layer that took codes for the weight.

    Some size their matrices by the weight's, and some multiply with it: the codes are neither its shape nor its
    numbers. Back where it is another error.
    """
    if isinstance(error, torch.OutOfMemoryError) or (around := _failed(error.__traceback__)) is None:
        return
    base: QuantizedWeight = around.base_layer  # type: ignore[assignment]
    codes, shape = base.weight, base.packed.shape
    name = next(name for name, module in layer.named_modules() if module is around)
    raise InputError(
        f"{name} of layer {number}: {type(around).__module__} took the {base.bits}-bit codes, {codes.dtype} "
        f"{tuple(codes.shape)}, for the weight, which is {tuple(shape)} ({error}). Call dequantize() of the model "
        "before the adapter is made, or make one that leaves the weight to its module, as LoRA does."
    ) from error


def _failed(traceback: TracebackType | None) -> nn.Module | None:
    """The innermost module around codes that was at work, unless it had handed on to what is beneath."""
    found = None
    while traceback is not None:
        at_work = traceback.tb_frame.f_locals.get("self")
        if isinstance(at_work, QuantizedWeight):
            found = None
        elif isinstance(at_work, nn.Module) and isinstance(getattr(at_work, "base_layer", None), QuantizedWeight):
            found = at_work
        traceback = traceback.tb_next
    return found
