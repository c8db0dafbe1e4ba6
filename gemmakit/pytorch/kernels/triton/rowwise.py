"""Norm and gate forward and backward: the parts of a training step that are no matrix products. Bound by memory.

Each tensor is read once and written once, 16 bytes a thread; what lies between is float32. No atomics: results do not
depend on the order in which programs run. Offsets are 64 bits wide. Axis letters: M rows, D hidden.
"""

# A kernel is compiled from its source by Triton: its names are tensors of the device, which Python's types do not tell.
# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gemmakit.pytorch.kernels.triton.gemv import _GELU_ERF, _GELU_TANH, _RELU, activated


@triton.jit
def norm(
    x_ptr, weight_ptr, residual_ptr, y_ptr, scale_ptr, eps, gain,
    D: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, OFFSET: tl.constexpr = 1.0,
):  # fmt: skip
    """y = x * scale * (OFFSET + weight) * gain with scale = rsqrt(mean(x^2) + eps), rounded once. x, y: (M, D).

    With RESIDUAL y is the sum with it, rounded once more. scale: (M,) float32. Grid: M. BLOCK: at least D.
    """
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(scale_ptr + row, scale)
    y = (x * scale * (OFFSET + weight) * gain).to(y_ptr.dtype.element_ty)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        y = (residual + y.to(tl.float32)).to(y.dtype)
    tl.store(y_ptr + row * D + d, y, mask=d < D)


@triton.jit(do_not_specialize=["rows"])
def norm_back(
    dy_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, sums_ptr, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, FOR_WEIGHT: tl.constexpr,
):  # fmt: skip
    """With n = x * scale and g = dy * (1 + weight): dx = scale * (g - n * mean(g * n)), and sums of dy * n over rows.

    Program p of P takes the rows p, p + P, ... and writes its sums to row p of sums (P, D), in float32.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    d = tl.arange(0, BLOCK)
    factor = 1.0 + tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in range(program, rows, programs):
        row = tl.cast(i, tl.int64)
        scale = tl.load(scale_ptr + row)
        dy = tl.load(dy_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        n = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
        g = dy * factor
        dx = scale * (g - n * (tl.sum(g * n, 0) / D))
        tl.store(dx_ptr + row * D + d, dx.to(dx_ptr.dtype.element_ty), mask=d < D)
        if FOR_WEIGHT:
            sums += dy * n
    if FOR_WEIGHT:
        tl.store(sums_ptr + program.to(tl.int64) * D + d, sums, mask=d < D)


@triton.jit
def gated(gate_ptr, up_ptr, y_ptr, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(gate) * up of n elements, the activation and the product rounded. Grid: blocks of BLOCK."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < n, other=0.0)
    up = tl.load(up_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    act = activated(gate.to(tl.float32), ACT).to(gate.dtype)
    tl.store(y_ptr + i, (act.to(tl.float32) * up).to(gate.dtype), mask=i < n)


@triton.jit
def slope(gate, ACT: tl.constexpr):
    """The derivative of `gemv.activated` in float32."""
    if ACT == _GELU_TANH:
        square = gate * gate
        p = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * gate * (1.0 + 0.044715 * square)))
        bend = gate * p * (1.0 - p) * (1.5957691216057308 + 0.21406242735003473 * square)
        # Far out the bend is zero times what may be infinite.
        return p + tl.where(tl.abs(gate) > 20.0, 0.0, bend)
    elif ACT == _GELU_ERF:
        below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        return below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif ACT == _RELU:
        return tl.where(gate <= 0.0, 0.0, 1.0)
    else:
        p = 1.0 / (1.0 + tl.exp(-gate))
        return p + gate * p * (1.0 - p)


@triton.jit
def gated_back(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """dgate = dy * up * act'(gate), dup = dy * act(gate), where the activation is what forward had rounded it to."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < n, other=0.0)
    up = tl.load(up_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    act = activated(gate.to(tl.float32), ACT).to(gate.dtype)
    tl.store(dgate_ptr + i, (dy * up * slope(gate.to(tl.float32), ACT)).to(gate.dtype), mask=i < n)
    tl.store(dup_ptr + i, (dy * act.to(tl.float32)).to(gate.dtype), mask=i < n)
