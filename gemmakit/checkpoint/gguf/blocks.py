"""ggml's quantized blocks to numbers and back, in numpy; bit for bit what llama.cpp's reference code gives.

Arrays: raw uint8 (blocks, bytes of a block); numbers float32 (blocks, elements of a block). Source: ggml-quants.c,
ggml-common.h (the order of a block's fields).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[Any]  # uint8; operations widen the type that a checker sees
Numbers = NDArray[Any]  # float32


def dequantize(kind: str, raw: Raw) -> Numbers:
    """The numbers that blocks of this type stand for; `kind` is a key of `DECODERS`."""
    return DECODERS[kind](raw)


def quantize(kind: str, numbers: Numbers) -> Raw:
    """Blocks of Q8_0 or Q4_0 from finite numbers (blocks, 32)."""
    return ENCODERS[kind](numbers)


# -- blocks of 32 ------------------------------------------------------------------------------------------------------


def _q4_0(raw: Raw) -> Numbers:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 2:]) - np.float32(8))


def _q4_1(raw: Raw) -> Numbers:
    return _half(raw[:, :2]) * _nibbles(raw[:, 4:]) + _half(raw[:, 2:4])


def _q5_0(raw: Raw) -> Numbers:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 6:]) + _fifth_bits(raw[:, 2:6]) - np.float32(16))


def _q5_1(raw: Raw) -> Numbers:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 8:]) + _fifth_bits(raw[:, 4:8])) + _half(raw[:, 2:4])


def _q8_0(raw: Raw) -> Numbers:
    return _half(raw[:, :2]) * raw[:, 2:].view(np.int8).astype(np.float32)


# -- super-blocks of 256 -----------------------------------------------------------------------------------------------


def _q4_k(raw: Raw) -> Numbers:
    step, low = _scales_k(raw)
    return _joined(step * _nibble_runs(raw[:, 16:144]) - low)


def _q5_k(raw: Raw) -> Numbers:
    step, low = _scales_k(raw)
    # Bit r of byte j is the fifth bit of element j of run r.
    fifth = raw[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1
    codes = _nibble_runs(raw[:, 48:176]) + (fifth.transpose(0, 2, 1) << 4).astype(np.float32)
    return _joined(step * codes - low)


def _q6_k(raw: Raw) -> Numbers:
    low = raw[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = low.reshape(-1, 8, 32) | high.reshape(-1, 8, 32) << 4
    scales = _half(raw[:, 208:210]) * raw[:, 192:208].view(np.int8).astype(np.float32)
    centred = codes.reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    return _joined(scales[..., None] * centred)


def _scales_k(raw: Raw) -> tuple[Numbers, Numbers]:
    """Step and offset of the eight runs of 32, each (blocks, 8, 1), from two halves and sixteen numbers of 6 bits."""
    packed = raw[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    steps = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    lows = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    step = _half(raw[:, :2]) * steps.astype(np.float32)
    low = _half(raw[:, 2:4]) * lows.astype(np.float32)
    return step[..., None], low[..., None]


def _nibble_runs(raw: Raw) -> Numbers:
    """Eight runs of 32 from 128 bytes: 32 bytes hold two runs, the first in their low bits. (blocks, 8, 32)."""
    both = raw.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    return both.reshape(-1, 8, 32).astype(np.float32)


def _joined(numbers: Numbers) -> Numbers:
    return numbers.reshape(len(numbers), -1)


# -- fields ------------------------------------------------------------------------------------------------------------


def _half(raw: Raw) -> Numbers:
    """A float16 a block, as a column."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: Raw) -> Numbers:
    """32 numbers from 16 bytes: the low bits of each, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float32)


def _fifth_bits(raw: Raw) -> Numbers:
    """16 or 0 for each of 32 elements, whose bits lie in four bytes, lowest first."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little").astype(np.float32) * np.float32(16)


# -- numbers to blocks -------------------------------------------------------------------------------------------------


def _to_q8_0(numbers: Numbers) -> Raw:
    step = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(127)
    scaled = numbers * _inverse(step)
    # Halves away from zero. Adding 0.5 would round twice, and rint() takes halves to the even number.
    whole = np.trunc(scaled)
    codes = whole + np.trunc(2 * (scaled - whole))
    return np.concatenate([_from_half(step), codes.astype(np.int8).view(np.uint8)], axis=1)


def _to_q4_0(numbers: Numbers) -> Raw:
    largest = np.take_along_axis(numbers, np.abs(numbers).argmax(axis=1, keepdims=True), axis=1)
    step = largest / np.float32(-8)
    codes = np.trunc(numbers * _inverse(step) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    return np.concatenate([_from_half(step), codes[:, :16] | codes[:, 16:] << 4], axis=1)


def _inverse(step: Numbers) -> Numbers:
    """1 / step; zero for a step whose inverse is infinite, and which is zero in float16."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / step
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _from_half(step: Numbers) -> Raw:
    return step.astype(np.float16).view(np.uint8)


DECODERS: dict[str, Callable[[Raw], Numbers]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
ENCODERS: dict[str, Callable[[Numbers], Any]] = {"Q8_0": _to_q8_0, "Q4_0": _to_q4_0}
