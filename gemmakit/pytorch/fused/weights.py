"""The weight behind a projection, where it computes a plain product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemmakit.pytorch.kernels import PackedWeight
from gemmakit.pytorch.layers import Linear
from gemmakit.pytorch.parallel.modules import Summed, SummedLinear

DENSE = (Tensor, nn.Parameter)


def weight_of(module: nn.Module) -> Tensor | PackedWeight | None:
    """The weight (O, I) behind a projection that computes x @ weight.T + bias and nothing else; None for any other.

    Of one that `is_summed` it is this process's part, whose result is no use without the others'. None means that the
    module must be called: an adapter, bitsandbytes, a subclass, hooks, a forward of its own.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    if type(module) in (nn.Linear, Linear, SummedLinear):
        weight = module._parameters.get("weight")
        return weight if type(weight) in DENSE else None
    packed = getattr(module, "packed", None) if type(module).__module__.startswith("gemmakit.") else None
    return packed if isinstance(packed, PackedWeight) else None


def is_summed(module: nn.Module | None) -> bool:
    """Whether what this projection gives is a sum over processes."""
    return isinstance(module, Summed)


def misfit(module: nn.Module, dtype: torch.dtype) -> str:
    """Why no kernel multiplies activations of `dtype` by this projection's weight; empty where one may."""
    weight, bias = weight_of(module), module.bias
    if isinstance(weight, Tensor) and weight.dtype != dtype:
        return f"in {weight.dtype} and the activations in {dtype}"
    if isinstance(weight, PackedWeight) and (weight.bits == 4) != (weight.zero is not None):
        return f"in {weight.bits} bits {'without' if weight.bits == 4 else 'with'} zeros"
    if isinstance(bias, Tensor) and bias.dtype != dtype:
        return f"with a bias in {bias.dtype} and the activations in {dtype}"
    tensors = weight.tensors if isinstance(weight, PackedWeight) else (weight,)
    return "" if all(t is not None and t.is_contiguous() for t in tensors) else "not contiguous"
