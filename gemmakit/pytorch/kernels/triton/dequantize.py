"""A packed weight written out, for more rows than a matrix-times-rows kernel serves well."""

# A kernel is compiled from its source by Triton: its names are tensors of the device, which Python's types do not tell.
# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expand8(
    code_ptr, scale_ptr, y_ptr, O, I: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    """y[o, i] = scale[o, i // GROUP] * code[o, i], computed in float32, rounded once. Grid: O / BO, I / BI."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)[:, None]
    i = tl.program_id(1) * BI + tl.arange(0, BI)[None, :]
    mask = (o < O) & (i < I)
    at = o.to(tl.int64) * I + i
    code = tl.load(code_ptr + at, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
    scale = tl.load(scale_ptr + o * G + i // GROUP, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (code * scale).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expand4(
    code_ptr, scale_ptr, zero_ptr, y_ptr, O, I: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    """y[o, i] = scale * (code - zero); byte j of a block of 32 holds inputs j and j + 16. Grid: O / BO, I / BI."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)[:, None]
    block = tl.program_id(1) * (BI // 32) + tl.arange(0, BI // 2)[None, :] // 16
    j = tl.arange(0, BI // 2)[None, :] % 16
    low = block * 32 + j
    mask = (o < O) & (block * 32 < I)
    code = tl.load(code_ptr + o.to(tl.int64) * ((I + 31) // 32 * 16) + block * 16 + j, mask=mask, other=0)
    group = o * G + block * 32 // GROUP
    scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32)
    at = o.to(tl.int64) * I + low
    lower = ((code & 15).to(tl.float32) - zero) * scale
    upper = ((code >> 4).to(tl.float32) - zero) * scale
    tl.store(y_ptr + at, lower.to(y_ptr.dtype.element_ty), mask=mask & (low < I))
    tl.store(y_ptr + at + 16, upper.to(y_ptr.dtype.element_ty), mask=mask & (low + 16 < I))
