"""Torch tensors in, the kernels of `rowwise` started, torch tensors out. Their plain forms are in reference.

The constants are reasoned, not measured. Axis letters: M rows, D hidden, F mlp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemmakit.pytorch.kernels import reference
from gemmakit.pytorch.kernels.triton import rowwise, starting

# A program of the norm keeps a row in its registers, of its backward three rows and the sums: longer ones would spill,
# and go through torch.
MAX_DIM = 8192
# Programs of the norm's backward: four a multiprocessor of an H100, which keeps 32 KB on their way. The same number
# everywhere, so that the sums for the weight are the same on every device.
PROGRAMS = 512
# Elements a program of the gate takes: 16 a thread.
GATE_BLOCK, GATE_WARPS = 2048, 4


def norm_constants(D: int) -> dict[str, int]:
    """16 elements of a row to a thread."""
    block = max(1 << (D - 1).bit_length(), 32)
    return dict(D=D, BLOCK=block, num_warps=min(max(block // 512, 1), 16))


def rms_norm_saving(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: (..., D), weight: (D,) -> the norm in x's dtype, and what its rows were scaled by: (...) float32."""
    if x.shape[-1] > MAX_DIM:
        return reference.rms_norm_saving(x, weight, eps)
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _start(rowwise.norm, scale.numel(), (x, weight.contiguous(), y, scale, eps), **norm_constants(x.shape[-1]))
    return y, scale


def rms_norm_back(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """What the gradient (..., D) of the norm is to x, (..., D), and to the weight: (D,), or (0,) unless asked for."""
    if x.shape[-1] > MAX_DIM:
        return reference.rms_norm_back(gradient, x, weight, scale, for_weight)
    gradient, x, M, D = gradient.contiguous(), x.contiguous(), scale.numel(), x.shape[-1]
    programs = min(M, PROGRAMS)
    dx = torch.empty_like(x)
    sums = x.new_empty((programs if for_weight else 0, D), dtype=torch.float32)
    tensors = (gradient, x, weight.contiguous(), scale.contiguous(), dx, sums)
    _start(rowwise.norm_back, programs, (*tensors, M), FOR_WEIGHT=for_weight, **norm_constants(D))
    return dx, sums.sum(0).to(weight.dtype) if for_weight else weight.new_empty(0)


def gated(gate: Tensor, up: Tensor, act: int) -> Tensor:
    """act(gate) * up, (..., F) like both."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _start_gate(rowwise.gated, (gate, up, y), act)
    return y


def gated_back(gradient: Tensor, gate: Tensor, up: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """What the gradient (..., F) of the product is to gate and to up."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
    _start_gate(rowwise.gated_back, (gradient, gate, up, for_gate, for_up), act)
    return for_gate, for_up


def _start_gate(kernel: Any, tensors: Sequence[Tensor], act: int) -> None:
    n = tensors[0].numel()
    _start(kernel, -(-n // GATE_BLOCK), (*tensors, n), ACT=int(act), BLOCK=GATE_BLOCK, num_warps=GATE_WARPS)


def _start(kernel: Any, programs: int, arguments: Sequence[Any], **constants: Any) -> None:
    """Run a kernel on the device of its first argument. Raises Refused where it cannot be compiled or started."""
    if programs:
        with starting(arguments[0].device):
            kernel[(programs,)](*arguments, **constants)
