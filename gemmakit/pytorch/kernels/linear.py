"""x @ weight.T + bias, the seam through which every projection and the head go.

The reference is torch's linear. On the CPU, a few rows against a large 16-bit weight, which is what a decoding step is,
go through the native kernel, which reads the weight once, in its own format, for all rows. Axis letters: M rows, O
outputs, I inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.pytorch.kernels import cpu

MAX_ROWS = 8
# Smaller weights stay in the processor's caches, where torch is as good and the call costs more than it saves.
MIN_WEIGHT = 1 << 20
_FORMATS = {torch.bfloat16: 0, torch.float16: 1}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., I), weight: (O, I), bias: (O,) or None -> (..., O), in x's dtype, summed in float32."""
    if (
        weight.dtype in _FORMATS
        and not torch.is_grad_enabled()
        and weight.device.type == "cpu"
        and weight.numel() >= MIN_WEIGHT
        and x.dtype == weight.dtype
        and not torch.compiler.is_compiling()  # before the row count, on which a compiled graph would depend
        and x.numel() <= MAX_ROWS * weight.shape[1]
        and weight.is_contiguous()
        and cpu.library() is not None
    ):
        return torch.ops.gemmakit.linear_rows(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_plan(weight: Tensor) -> str:
    """Which form a decoding step takes for this weight, and why, in words."""
    if weight.device.type != "cpu":
        return f"torch on {weight.device.type}"
    if weight.dtype not in _FORMATS:
        return f"torch ({str(weight.dtype).removeprefix('torch.')} has no native kernel)"
    if weight.numel() < MIN_WEIGHT:
        return f"torch ({weight.numel():,} weights fit the caches)"
    return f"native {cpu.instruction_set()}" if cpu.library() is not None else f"torch (native kernel {cpu.why_not()})"


def _linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    library = cpu.library()
    assert library is not None
    O, I = weight.shape
    M = x.numel() // I
    if M == 0:
        return x.new_empty(*x.shape[:-1], O)
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], O, dtype=x.dtype)
    wide = torch.empty(M * I, dtype=torch.float32)
    failed = library.gemmakit_linear_rows(
        _FORMATS[x.dtype],
        weight.data_ptr(),
        x.data_ptr(),
        wide.data_ptr(),
        None if bias is None else bias.contiguous().data_ptr(),
        y.data_ptr(),
        M,
        O,
        I,
        torch.get_num_threads(),
    )
    assert not failed, f"linear_rows takes 1 to {MAX_ROWS} rows, got {M}"
    return y


# A torch operator rather than a bare call, so that dispatch modes, fake tensors and profilers see it.
_ops = torch.library.Library("gemmakit", "DEF")
_ops.define("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_ops.impl("linear_rows", _linear_rows, "CPU")


def _linear_rows_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.register_fake("gemmakit::linear_rows", _linear_rows_shape)
