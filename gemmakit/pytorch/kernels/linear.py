"""x @ weight.T + bias, the seam through which every projection and the head go.

The reference is torch's linear. A few rows against a large weight, which is what a decoding step is, go through a
kernel that reads the weight once, in its own format, for all rows: on the CPU the native one, on a GPU Triton's. On the
CPU many rows go through panels in float32 where the processor only emulates 16-bit products. Axis letters: M rows,
O outputs, I inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.pytorch.kernels import cpu, triton
from gemmakit.pytorch.kernels.cpu import MAX_ROWS
from gemmakit.pytorch.kernels.packed import PackedWeight
from gemmakit.pytorch.kernels.panels import multiply, product_dtype
from gemmakit.pytorch.kernels.quantized import few_rows, packed_plan

# Smaller weights stay in the processor's caches, where torch is as good and the call costs more than it saves.
MIN_WEIGHT = 1 << 20
# Types of devices that the Triton kernel is for.
GPU = {"cuda"}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., I), weight: (O, I), bias: (O,) or None -> (..., O), in x's dtype, summed in float32."""
    if weight.device.type in GPU and not torch.is_grad_enabled() and _few_on_gpu(x, weight):
        return torch.ops.gemmakit.linear_rows(x, weight, bias)
    if (
        weight.dtype in cpu.FORMATS
        and not torch.is_grad_enabled()
        and weight.device.type == "cpu"
        and weight.numel() >= MIN_WEIGHT
        and x.dtype == weight.dtype
        and not torch.compiler.is_compiling()  # before the row count, on which a compiled graph would depend
        and (x.numel() <= MAX_ROWS * weight.shape[1] or product_dtype(x.dtype) != x.dtype)
        and weight.is_contiguous()
        and cpu.library() is not None
    ):
        return torch.ops.gemmakit.linear_rows(x, weight, bias)
    return F.linear(x, weight, bias)


def _few_on_gpu(x: Tensor, weight: Tensor) -> bool:
    """Whether the Triton kernel multiplies: a few rows, a large weight, both plain and of one of its dtypes."""
    return (
        weight.numel() >= MIN_WEIGHT
        and x.dtype == weight.dtype
        and x.dtype in triton.DTYPES
        and not torch.compiler.is_compiling()  # before the row count, as below
        and 0 < x.numel() <= triton.MAX_ROWS * weight.shape[1]
        and weight.is_contiguous()
        and not torch.is_autocast_enabled(weight.device.type)
        and triton.available(weight.device)
    )


def linear_plan(weight: Tensor | PackedWeight) -> str:
    """Which form a decoding step takes for this weight, and why, in words."""
    if isinstance(weight, PackedWeight):
        return packed_plan(weight)
    if weight.device.type in GPU:
        return _gpu_plan(weight)
    if weight.device.type != "cpu":
        return f"torch on {weight.device.type}"
    if weight.dtype not in cpu.FORMATS:
        return f"torch ({str(weight.dtype).removeprefix('torch.')} has no native kernel)"
    if weight.numel() < MIN_WEIGHT:
        return f"torch ({weight.numel():,} weights fit the caches)"
    return f"native {cpu.instruction_set()}" if cpu.library() is not None else f"torch (native kernel {cpu.why_not()})"


def _gpu_plan(weight: Tensor) -> str:
    on = f"torch on {weight.device.type}"
    if weight.dtype not in triton.DTYPES:
        return f"{on} ({str(weight.dtype).removeprefix('torch.')} has no Triton kernel)"
    if weight.numel() < MIN_WEIGHT:
        return f"{on} ({weight.numel():,} weights are few)"
    why = triton.why_not(weight.device)
    return f"{on} (Triton kernels: {why})" if why else f"Triton, without gradients, up to {triton.MAX_ROWS} rows"


def _linear_rows_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from gemmakit.pytorch.kernels.triton import launch

    bias = None if bias is None else bias.to(x.dtype).contiguous()
    return launch.linear(x, weight.detach(), bias)


def _linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == 0:
        return x.new_empty(shape)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    # Emulated products lose to a second reading of the weight.
    few = len(flat) <= (MAX_ROWS if product_dtype(x.dtype) == x.dtype else 2 * MAX_ROWS)
    return (few_rows if few else multiply)(flat, weight, bias).view(shape)


# A torch operator rather than a bare call, so that dispatch modes, fake tensors and profilers see it.
_ops = torch.library.Library("gemmakit", "FRAGMENT")
_ops.define("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_ops.impl("linear_rows", _linear_rows, "CPU")
_ops.impl("linear_rows", _linear_rows_on_gpu, "CUDA")


def _linear_rows_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.register_fake("gemmakit::linear_rows", _linear_rows_shape)
