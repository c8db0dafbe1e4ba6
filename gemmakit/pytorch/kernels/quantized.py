"""x @ weight.T + bias for a weight in 8 or 4 bits. Axis letters: M rows, O outputs, I inputs.

On the CPU a few rows go through the native kernel, which computes with the codes as they lie and with x rounded to 16
bits in blocks of 32 (cpu/inputs.h bounds the error). More rows are multiplied in bytes, with x rounded to 8 bits in
blocks of 32, where the processor is fast at that, gradients are off and the weight's `activation_bits` are 8; else with
panels of the weight, expanded in turn. The reference is dequantize and torch's linear.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.kernels.ids import WeightFormat
from gemmakit.pytorch.kernels.packed import PackedWeight
from gemmakit.pytorch.kernels.panels import multiply, multiply_back

# Bits -> rows up to which reading the codes once for every eight costs less than expanding them.
FEW_ROWS = {8: 16, 4: 24}


def linear_packed(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: (..., I), packed: (O, I) of weights, bias: (O,) or None -> (..., O), in x's dtype.

    Gradients reach x and the bias.
    """
    codes, scale, zero, in_features, group_size, format, activation_bits = packed
    bits = 16 if torch.is_grad_enabled() else activation_bits
    return torch.ops.gemmakit.linear_packed(x, codes, scale, zero, bias, in_features, group_size, int(format), bits)


def takes_bytes(packed: PackedWeight) -> bool:
    """Whether many rows are multiplied by this weight in bytes, with x rounded to 8 bits in blocks of 32."""
    return packed.activation_bits == 8 and cpu.multiplies_bytes(packed)


def packed_plan(packed: PackedWeight) -> str:
    """Which form a decoding step takes for this weight, and why, in words."""
    kind = f"int{packed.bits}"
    if packed.codes.device.type != "cpu":
        return f"{kind} on {packed.codes.device.type}"
    if cpu.library() is None:
        return f"torch, {kind} expanded (native kernel {cpu.why_not()})"
    if not cpu.reads(packed):
        return f"torch, {kind} expanded (no kernel reads scales of {str(packed.scale.dtype).removeprefix('torch.')})"
    many = "; beyond 8 rows activations in 8 bits" if takes_bytes(packed) else ""
    return f"native {cpu.instruction_set()} {kind}{many}"


@lru_cache(maxsize=1)
def _warn_once() -> None:
    warnings.warn(
        f"gemmakit: quantized weights are expanded for every product, which is slow: the native CPU kernel is "
        f"{cpu.why_not()}.",
        stacklevel=4,
    )


def few_rows(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    """x: (M, I), in pieces of at most eight rows, none much smaller than the others."""
    if len(x) <= cpu.MAX_ROWS:
        return _native(x, weight, bias)
    return torch.cat([_native(piece, weight, bias) for piece in x.tensor_split(-(-len(x) // cpu.MAX_ROWS))])


def _native(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    return cpu.project(x, [cpu.matrix(weight, bias)])[0]


def _on_gpu(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor | None:
    """The Triton kernel's answer where it runs."""
    from gemmakit.pytorch.kernels import triton

    if x.device.type != "cuda" or not triton.available(x.device):
        return None
    from gemmakit.pytorch.kernels.triton import launch

    return launch.linear_packed(x, packed, bias) if x.dtype in triton.DTYPES else None


def _linear_packed(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    group_size: int,
    format: int,
    activation_bits: int,
) -> Tensor:
    packed = _contiguous(codes, scale, zero, in_features, group_size, format, activation_bits)
    shape = (*x.shape[:-1], len(codes))
    flat = x.reshape(-1, in_features).contiguous()
    if flat.numel() == 0 or len(codes) == 0:
        return x.new_zeros(shape) if bias is None else x.new_zeros(shape) + bias
    if x.device.type != "cpu":
        found = _on_gpu(flat, packed, bias)
        return (multiply(flat, packed, bias) if found is None else found).view(shape)
    return _on_cpu(flat, packed, bias).view(shape)


def _on_cpu(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    if cpu.library() is None:
        _warn_once()
    elif x.dtype in cpu.FORMATS and cpu.reads(packed):
        if len(x) <= cpu.MAX_ROWS or takes_bytes(packed):
            return _native(x, packed, bias)
        if len(x) <= FEW_ROWS[packed.bits]:
            return few_rows(x, packed, bias)
    return multiply(x, packed, bias)


def _contiguous(codes: Tensor, scale: Tensor, zero: Tensor | None, *facts: int) -> PackedWeight:
    """The kernels read rows without gaps. facts: PackedWeight's fields after the tensors."""
    in_features, group_size, format, bits = facts
    zero = None if zero is None else zero.contiguous()
    codes, scale = codes.contiguous(), scale.contiguous()
    return PackedWeight(codes, scale, zero, in_features, group_size, WeightFormat(format), bits)


def _linear_packed_back(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, group_size: int, format: int
) -> Tensor:
    packed = _contiguous(codes, scale, zero, in_features, group_size, format, 16)
    flat = gradient.reshape(-1, len(codes))
    return multiply_back(flat, packed).view(*gradient.shape[:-1], in_features)


_ops = torch.library.Library("gemmakit", "FRAGMENT")
_weight = "Tensor codes, Tensor scale, Tensor? zero"
_facts = "int in_features, int group_size, int format"
_ops.define(f"linear_packed(Tensor x, {_weight}, Tensor? bias, {_facts}, int activation_bits) -> Tensor")
_ops.define(f"linear_packed_back(Tensor gradient, {_weight}, {_facts}) -> Tensor")
_ops.impl("linear_packed", _linear_packed, "CompositeExplicitAutograd")
_ops.impl("linear_packed_back", _linear_packed_back, "CompositeExplicitAutograd")


def _shape(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _shape_back(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, group_size: int, format: int
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero, bias, *ctx.facts, _ = inputs
    ctx.save_for_backward(codes, scale, zero)
    ctx.biased = bias is not None


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero = ctx.saved_tensors
    for_x = for_bias = None
    if ctx.needs_input_grad[0]:
        for_x = torch.ops.gemmakit.linear_packed_back(gradient, codes, scale, zero, *ctx.facts)
    if ctx.biased and ctx.needs_input_grad[4]:
        for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return for_x, None, None, None, for_bias, None, None, None, None


torch.library.register_fake("gemmakit::linear_packed", _shape)
torch.library.register_fake("gemmakit::linear_packed_back", _shape_back)
torch.library.register_autograd("gemmakit::linear_packed", _differentiate, setup_context=_keep)
