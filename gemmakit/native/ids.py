"""The numbers by which Python, C++ and Triton know weight formats and activations.

Needs nothing but Python: when the C++ is compiled, hatch_build.py writes both enumerations into its header ids.h.
"""

from __future__ import annotations

from enum import IntEnum


class WeightFormat(IntEnum):
    """How a weight lies in memory: plain numbers, or codes beside scales (see `PackedWeight`)."""

    BF16 = 0
    F16 = 1
    F32 = 2
    INT8_ROWS = 3  # 8 bits, a float32 scale a row
    INT8_GROUPS = 4  # 8 bits, a float16 scale a group of inputs
    INT4 = 5  # 4 bits, a float16 scale and a zero a group of inputs
    INT5 = 6  # 5 bits, a float16 scale a group of inputs
    INT6 = 7  # 6 bits, the same

    @property
    def is_packed(self) -> bool:
        return self >= WeightFormat.INT8_ROWS

    @property
    def bits(self) -> int:
        """Of a number or a code."""
        return _BITS[self]


_BITS = {
    WeightFormat.BF16: 16,
    WeightFormat.F16: 16,
    WeightFormat.F32: 32,
    WeightFormat.INT8_ROWS: 8,
    WeightFormat.INT8_GROUPS: 8,
    WeightFormat.INT4: 4,
    WeightFormat.INT5: 5,
    WeightFormat.INT6: 6,
}


class Activation(IntEnum):
    """The functions of the gated MLP that kernels have; `reference.ACTIVATIONS` says what they compute."""

    GELU_TANH = 0
    GELU_ERF = 1  # not on the CPU
    RELU = 2
    SILU = 3
