"""Matrix times a few rows: what a decoding step does with every weight. Each weight is read once, 16 bytes a load.

A program owns BO outputs and walks over the inputs, BI at a time. Every thread multiplies the codes of its own 16
bytes with the inputs they meet and adds them up alone (C to a partial sum), so threads meet only once, at the end.
No atomics: results do not depend on the order in which programs run. Sums are float32.

Axis letters: R rows (padded to a power of two), O outputs, I inputs, G groups a weight row.
"""

# A kernel is compiled from its source by Triton: its names are tensors of the device, which Python's types do not tell.
# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gemmakit.native.ids import Activation, WeightFormat

_INT8_ROWS = tl.constexpr(int(WeightFormat.INT8_ROWS))
_INT8_GROUPS = tl.constexpr(int(WeightFormat.INT8_GROUPS))
_INT4 = tl.constexpr(int(WeightFormat.INT4))
_GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))
_GELU_ERF = tl.constexpr(int(Activation.GELU_ERF))
_RELU = tl.constexpr(int(Activation.RELU))


@triton.jit
def places(start, n: tl.constexpr, C: tl.constexpr, step: tl.constexpr):
    """n runs of C neighbours, `step` apart, from `start`: (1, 1, n, C)."""
    return start + tl.arange(0, n)[None, None, :, None] * step + tl.arange(0, C)[None, None, None, :]


@triton.jit
def row_numbers(R: tl.constexpr):
    return tl.arange(0, R)[:, None, None, None]


@triton.jit
def row_scales(x_ptr, rows, eps, I: tl.constexpr, R: tl.constexpr, BI: tl.constexpr, C: tl.constexpr):
    """rsqrt(mean(x^2) + eps) of each row: (R, 1, 1, 1) float32."""
    r = row_numbers(R)
    squares = tl.zeros((R, 1, BI // C, C), tl.float32)
    for start in tl.static_range(0, I, BI):
        i = places(start, BI // C, C, C)
        x = tl.load(x_ptr + r * I + i, mask=(r < rows) & (i < I), other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(tl.sum(squares, 3), 2) / I + eps)[:, :, None, None]


@triton.jit
def inputs(
    x_ptr, norm_ptr, scales, rows, i, I: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """x[:, i], normalised and rounded as the module rounds when NORM: (R, 1, n, C) in x's dtype."""
    r = row_numbers(R)
    x = tl.load(x_ptr + r * I + i, mask=(r < rows) & (i < I), other=0.0)
    if NORM:
        weight = tl.load(norm_ptr + i, mask=i < I, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * scales * (OFFSET + weight)).to(x.dtype)
    return x


@triton.jit
def input_tiles(
    x_ptr, norm_ptr, scales, rows, start,
    I: tl.constexpr, R: tl.constexpr, BI: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, FORMAT: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """The inputs from `start` in the order in which codes lie: all of them, or for INT4 those that meet the low and
    those that meet the high halves of the bytes. (R, 1, n, C) each.
    """
    if FORMAT == _INT4:
        low = inputs(x_ptr, norm_ptr, scales, rows, places(start, BI // 32, 16, 32), I, R, NORM, OFFSET)
        high = inputs(x_ptr, norm_ptr, scales, rows, places(start + 16, BI // 32, 16, 32), I, R, NORM, OFFSET)
        return low, high
    else:
        x = inputs(x_ptr, norm_ptr, scales, rows, places(start, BI // C, C, C), I, R, NORM, OFFSET)
        return x, x


@triton.jit
def codes_of(w_ptr, o, i, O, STRIDE: tl.constexpr):
    """w[o, i] as stored, (1, BO, n, C). A weight is not read again within a step, so it gives way in the caches."""
    o = o[None, :, None, None]
    mask = (o < O) & (i < STRIDE)
    return tl.load(w_ptr + o.to(tl.int64) * STRIDE + i, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def group_values(ptr, o, i, O, I: tl.constexpr, GROUP: tl.constexpr):
    """scale or zero of the group that input i (1, 1, n) is in: (1, BO, n)."""
    G: tl.constexpr = (I + GROUP - 1) // GROUP
    o = o[None, :, None]
    return tl.load(ptr + o * G + i // GROUP, mask=(o < O) & (i < I), other=0)


@triton.jit
def weight_tile(
    w_ptr, scale_ptr, zero_ptr, o, O, start,
    I: tl.constexpr, BI: tl.constexpr, FORMAT: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """codes (1, BO, n, C), scale and zero (1, BO, n) of BI inputs from `start`: all that a program reads of a weight.

    INT4 comes as words of 32 bits, 8 codes each.
    """
    if FORMAT == _INT4:
        words = codes_of(w_ptr, o, places(start // 8, BI // 32, 4, 4), O, (I + 31) // 32 * 4)
        block = start + tl.arange(0, BI // 32)[None, None, :] * 32
        scale = group_values(scale_ptr, o, block, O, I, GROUP)
        return words, scale, group_values(zero_ptr, o, block, O, I, GROUP)
    else:
        codes = codes_of(w_ptr, o, places(start, BI // C, C, C), O, I)
        if FORMAT == _INT8_GROUPS:
            scale = group_values(scale_ptr, o, start + tl.arange(0, BI // C)[None, None, :] * C, O, I, GROUP)
        else:
            scale = tl.zeros((1, 1, 1), tl.float32)
        return codes, scale, tl.zeros((1, 1, 1), tl.float32)


@triton.jit
def nibble(words, at: tl.constexpr, exponent):
    """Bits at..at+3 of each word as float32 times 2^at, exactly: they become low bits of 2^23, which is then taken off.

    Two operations, no shift and no conversion of numbers, which run at a fraction of the speed. at: at most 16.
    """
    bits = (words & (15 << at)) | exponent
    return bits.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def by_byte(x):
    """The inputs that meet bytes 0, 1, 2 and 3 of each word: (R, 1, n, 16) -> four of (R, 1, n, 4) float32."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 1, x.shape[2], 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)


@triton.jit
def int4_sums(words, low, high, rows):
    """Sums over the 32 inputs of a block. words: (1, BO, n, 4) uint32; low, high: (R, 1, n, 16) -> (R, BO, n).

    Byte j of a block holds input j in its low and input j + 16 in its high half. A nibble that stays where it is in
    its word is its code times a power of two, which the input gives back.
    """
    # 2^23's bits, which the compiler must not see: it would take two operations for "and, or" with two constants.
    exponent = (0x4B000000 + (rows >> 31)).to(tl.uint32)
    a0, a1, a2, a3 = by_byte(low)
    b0, b1, b2, b3 = by_byte(high)
    upper = words >> 16
    sums = nibble(words, 0, exponent) * a0
    sums += nibble(words, 4, exponent) * (b0 * 0.0625)
    sums += nibble(words, 8, exponent) * (a1 * 0.00390625)
    sums += nibble(words, 12, exponent) * (b1 * 0.000244140625)
    sums += nibble(upper, 0, exponent) * a2
    sums += nibble(upper, 4, exponent) * (b2 * 0.0625)
    sums += nibble(upper, 8, exponent) * (a3 * 0.00390625)
    sums += nibble(upper, 12, exponent) * (b3 * 0.000244140625)
    return tl.sum(sums, 3)


@triton.jit
def partial_sums(codes, scale, zero, x, x_high, rows, FORMAT: tl.constexpr):
    """What a tile of the weight adds to the partial sums: (R, BO, n), n runs of codes that one thread reads at once."""
    if FORMAT == _INT4:
        sums = int4_sums(codes.to(tl.uint32, bitcast=True), x, x_high, rows)
        totals = tl.sum(x.to(tl.float32) + x_high.to(tl.float32), 3)
        return (sums - zero.to(tl.float32) * totals) * scale.to(tl.float32)
    else:
        sums = tl.sum(codes.to(tl.float32) * x.to(tl.float32), 3)
        if FORMAT == _INT8_GROUPS:
            sums = sums * scale.to(tl.float32)
        return sums


@triton.jit
def finished(sums, scale_ptr, bias_ptr, o, O, BIAS: tl.constexpr, FORMAT: tl.constexpr):
    """Partial sums (R, BO, n) -> outputs (R, BO) float32, not rounded."""
    y = tl.sum(sums, 2)
    if FORMAT == _INT8_ROWS:
        y = y * tl.load(scale_ptr + o, mask=o < O, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["rows"])
def project(
    x_ptr, norm_ptr, residual_ptr, eps, rows,
    w0, w1, w2, scale0, scale1, scale2, zero0, zero1, zero2, bias0, bias1, bias2, y0, y1, y2,
    O0, O1, O2,
    I: tl.constexpr, R: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    WEIGHTS: tl.constexpr, STAGES: tl.constexpr, OFFSET: tl.constexpr = 1.0,
):  # fmt: skip
    """y = (residual +) norm(x) @ w.T + bias for one to three weights (O0, O1, O2 outputs) in one launch.

    x: (rows, I); y of each weight: (rows, O). Grid: the blocks of BO outputs of the first weight, of the second, of the
    third; the blocks of R rows.
    """
    block, above = tl.program_id(0), tl.program_id(1) * R
    x_ptr += above * I
    rows -= above
    w, scale_ptr, zero_ptr, bias_ptr, y_ptr, O = w0, scale0, zero0, bias0, y0, O0
    if WEIGHTS > 1:
        first = tl.cdiv(O0, BO)
        if block >= first:
            block -= first
            w, scale_ptr, zero_ptr, bias_ptr, y_ptr, O = w1, scale1, zero1, bias1, y1, O1
            second = tl.cdiv(O1, BO)
            if WEIGHTS > 2:  # noqa: SIM102  the outer one is decided when the kernel is compiled
                if block >= second:
                    block -= second
                    w, scale_ptr, zero_ptr, bias_ptr, y_ptr, O = w2, scale2, zero2, bias2, y2, O2
    o = block * BO + tl.arange(0, BO)
    RUN: tl.constexpr = 32 if FORMAT == _INT4 else C
    if NORM and BI >= I:
        # Weights do not depend on what ran before, so they are asked for before the norm is summed.
        codes, scale, zero = weight_tile(w, scale_ptr, zero_ptr, o, O, 0, I, BI, FORMAT, C, GROUP)
        scales = row_scales(x_ptr, rows, eps, I, R, BI, C)
        x, x_high = input_tiles(x_ptr, norm_ptr, scales, rows, 0, I, R, BI, C, NORM, FORMAT, OFFSET)
        sums = partial_sums(codes, scale, zero, x, x_high, rows, FORMAT)
    else:
        scales = row_scales(x_ptr, rows, eps, I, R, BI, C) if NORM else 0.0
        sums = tl.zeros((R, BO, BI // RUN), tl.float32)
        for start in tl.range(0, I, BI, num_stages=STAGES):
            codes, scale, zero = weight_tile(w, scale_ptr, zero_ptr, o, O, start, I, BI, FORMAT, C, GROUP)
            x, x_high = input_tiles(x_ptr, norm_ptr, scales, rows, start, I, R, BI, C, NORM, FORMAT, OFFSET)
            sums += partial_sums(codes, scale, zero, x, x_high, rows, FORMAT)
    y = finished(sums, scale_ptr, bias_ptr, o, O, BIAS, FORMAT).to(y_ptr.dtype.element_ty)
    r = tl.arange(0, R)[:, None]
    at, mask = (above + r) * O + o[None, :], (r < rows) & (o < O)[None, :]
    if RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = (residual + y.to(tl.float32)).to(y.dtype)
    tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def activated(gate, ACT: tl.constexpr):
    """act(gate) in float32."""
    if ACT == _GELU_TANH:
        # 0.5 g (1 + tanh(u)) is g * sigmoid(2 u); the exponent overflows to the right limit.
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-inner))
    elif ACT == _GELU_ERF:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACT == _RELU:
        return tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return gate / (1.0 + tl.exp(-gate))


@triton.jit(do_not_specialize=["rows"])
def gate_up(
    x_ptr, norm_ptr, eps, rows,
    w0, w1, scale0, scale1, zero0, zero1, bias0, bias1, y_ptr,
    O,
    I: tl.constexpr, R: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, C: tl.constexpr,
    BIAS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, ACT: tl.constexpr,
    STAGES: tl.constexpr, OFFSET: tl.constexpr = 1.0,
):  # fmt: skip
    """act(norm(x) @ gate.T) * (norm(x) @ up.T), each step rounded as the modules round. x: (rows, I), y: (rows, O)."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    RUN: tl.constexpr = 32 if FORMAT == _INT4 else C
    if BI >= I:
        codes0, s0, z0 = weight_tile(w0, scale0, zero0, o, O, 0, I, BI, FORMAT, C, GROUP)
        codes1, s1, z1 = weight_tile(w1, scale1, zero1, o, O, 0, I, BI, FORMAT, C, GROUP)
        scales = row_scales(x_ptr, rows, eps, I, R, BI, C)
        x, x_high = input_tiles(x_ptr, norm_ptr, scales, rows, 0, I, R, BI, C, True, FORMAT, OFFSET)
        gates = partial_sums(codes0, s0, z0, x, x_high, rows, FORMAT)
        ups = partial_sums(codes1, s1, z1, x, x_high, rows, FORMAT)
    else:
        scales = row_scales(x_ptr, rows, eps, I, R, BI, C)
        gates = tl.zeros((R, BO, BI // RUN), tl.float32)
        ups = tl.zeros((R, BO, BI // RUN), tl.float32)
        for start in tl.range(0, I, BI, num_stages=STAGES):
            codes0, s0, z0 = weight_tile(w0, scale0, zero0, o, O, start, I, BI, FORMAT, C, GROUP)
            codes1, s1, z1 = weight_tile(w1, scale1, zero1, o, O, start, I, BI, FORMAT, C, GROUP)
            x, x_high = input_tiles(x_ptr, norm_ptr, scales, rows, start, I, R, BI, C, True, FORMAT, OFFSET)
            gates += partial_sums(codes0, s0, z0, x, x_high, rows, FORMAT)
            ups += partial_sums(codes1, s1, z1, x, x_high, rows, FORMAT)
    gate = finished(gates, scale0, bias0, o, O, BIAS, FORMAT).to(y_ptr.dtype.element_ty)
    up = finished(ups, scale1, bias1, o, O, BIAS, FORMAT).to(y_ptr.dtype.element_ty)
    act = activated(gate.to(tl.float32), ACT).to(gate.dtype)
    r = tl.arange(0, R)[:, None]
    y = (act.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(y_ptr + r * O + o[None, :], y, mask=(r < rows) & (o < O)[None, :])
