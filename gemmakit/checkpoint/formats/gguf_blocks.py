"""Blocks of GGUF as numbers, bit for bit those of ggml's reference.

A block is a row of bytes: codes of 4 to 8 bits, a step in float16 for all of them or for groups, and in some a lowest
number. Source of the layouts: ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# What is read in one go: its numbers stay in a core's cache between the few passes over them.
CHUNK_ELEMENTS = 1 << 16


class _Codes(NamedTuple):
    """codes (n, groups, width) as whole numbers, steps (n, groups), and what `shift` adds or subtracts, or None."""

    codes: Any
    steps: Any
    low: Any = None
    shift: Any = np.subtract


def dequantize(raw: Any, kind: str) -> Any:
    """Blocks (n, bytes of one) of a type of `DECODERS` -> float32 (n * elements of one,)."""
    codes, steps, low, shift = DECODERS[kind](raw)
    numbers = codes.astype(np.float32)
    with np.errstate(all="ignore"):  # any bits may be a step: infinite ones, and NaN
        numbers *= steps[..., None]
        if low is not None:
            shift(numbers, low[..., None], out=numbers)
    return numbers.reshape(-1)


def _half(raw: Any, at: int) -> Any:
    """The float16 at a byte of every block, (n, 1) float32."""
    return raw[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(raw: Any, groups: int = 1) -> Any:
    """Bytes (n, groups * w) -> their low, then their high 4 bits, (n, groups, 2, w) uint8."""
    raw = raw.reshape(len(raw), groups, -1)
    return np.stack((raw & 15, raw >> 4), axis=2)


def _fifth_bits(raw: Any) -> Any:
    """Four bytes a block -> their 32 bits from the lowest on, each worth 16."""
    return np.unpackbits(raw, axis=1, bitorder="little").reshape(len(raw), 1, 32) << np.uint8(4)


def _signed(codes: Any, zero: int) -> Any:
    return codes.view(np.int8) - np.int8(zero)


def _q4_0(raw: Any) -> _Codes:
    return _Codes(_signed(_nibbles(raw[:, 2:]).reshape(-1, 1, 32), 8), _half(raw, 0))


def _q4_1(raw: Any) -> _Codes:
    return _Codes(_nibbles(raw[:, 4:]).reshape(-1, 1, 32), _half(raw, 0), _half(raw, 2), np.add)


def _q5_0(raw: Any) -> _Codes:
    codes = _nibbles(raw[:, 6:]).reshape(-1, 1, 32) | _fifth_bits(raw[:, 2:6])
    return _Codes(_signed(codes, 16), _half(raw, 0))


def five_bit_codes(raw: Any) -> Any:
    """Blocks of Q5_0 (rows, blocks, 22) as the codes (rows, bytes) of `gemmakit.pytorch.kernels.packed` in 5 bits:
    of four blocks the low bits, which lie as they do there, then the upper ones, input j's beside those of j + 16."""
    raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 4), (0, 0))).reshape(len(raw), -1, 4, raw.shape[2])
    upper = np.unpackbits(raw[..., 2:6], axis=3, bitorder="little").reshape(*raw.shape[:2], 8, 16)
    upper = np.packbits(upper, axis=2, bitorder="little")
    return np.concatenate((raw[..., 6:].reshape(*raw.shape[:2], -1), upper[:, :, 0]), axis=2).reshape(len(raw), -1)


def five_bit_blocks(codes: Any, steps: Any) -> Any:
    """The inverse: codes (rows, bytes), and steps float16 (rows, blocks) -> blocks (rows, blocks, 22)."""
    rows, blocks = steps.shape
    fours = codes.reshape(rows, -1, 4 * 20)
    upper = np.unpackbits(fours[:, :, None, 64:], axis=2, bitorder="little").reshape(rows, -1, 4, 32)
    upper = np.packbits(upper, axis=3, bitorder="little")
    low, upper = fours[:, :, :64].reshape(rows, -1, 16), upper.reshape(rows, -1, 4)
    halves = np.ascontiguousarray(steps).view(np.uint8).reshape(rows, blocks, 2)
    return np.concatenate((halves, upper[:, :blocks], low[:, :blocks]), axis=2)


def _q5_1(raw: Any) -> _Codes:
    codes = _nibbles(raw[:, 8:]).reshape(-1, 1, 32) | _fifth_bits(raw[:, 4:8])
    return _Codes(codes, _half(raw, 0), _half(raw, 2), np.add)


def _q8_0(raw: Any) -> _Codes:
    return _Codes(raw[:, 2:].view(np.int8).reshape(-1, 1, 32), _half(raw, 0))


def _steps_of_k(raw: Any) -> tuple[Any, Any]:
    """Of Q4_K and Q5_K, the steps and the lowest numbers of eight groups: 6 bits each in 12 bytes, times one each."""
    first, second, rest = (raw[:, at : at + 4] for at in (4, 8, 12))
    steps = np.concatenate((first & 63, rest & 15 | first >> 2 & 48), axis=1)
    lows = np.concatenate((second & 63, rest >> 4 | second >> 2 & 48), axis=1)
    with np.errstate(all="ignore"):
        return _half(raw, 0) * steps.astype(np.float32), _half(raw, 2) * lows.astype(np.float32)


def _q4_k(raw: Any) -> _Codes:
    return _Codes(_nibbles(raw[:, 16:], 4).reshape(-1, 8, 32), *_steps_of_k(raw))


def _q5_k(raw: Any) -> _Codes:
    places = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (raw[:, None, 16:48] >> places & 1) << np.uint8(4)
    return _Codes(_nibbles(raw[:, 48:], 4).reshape(-1, 8, 32) | fifth, *_steps_of_k(raw))


def _q6_k(raw: Any) -> _Codes:
    places = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    upper = (raw[:, 128:192].reshape(-1, 2, 1, 32) >> places & 3) << np.uint8(4)
    codes = _signed(_nibbles(raw[:, :128], 2).reshape(-1, 2, 4, 32) | upper, 32)
    steps = raw[:, 192:208].view(np.int8).astype(np.float32)
    with np.errstate(all="ignore"):
        return _Codes(codes.reshape(-1, 16, 16), _half(raw, 208) * steps)


DECODERS: dict[str, Callable[[Any], _Codes]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
