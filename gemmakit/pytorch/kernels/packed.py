"""A weight in 8 or 4 bits: what files hold, kernels read and modules carry, in one layout.

w[o, i] = scale[o, i // group_size] * (code[o, i] - zero[o, i // group_size]). Axis letters: O outputs, I inputs,
G = ceil(I / group_size) groups a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.pytorch.kernels.ids import WeightFormat

# Of plain weights, and of activations.
FORMATS = {torch.bfloat16: WeightFormat.BF16, torch.float16: WeightFormat.F16, torch.float32: WeightFormat.F32}
# Codes of 4 bits lie in blocks of 32 inputs: byte j of a block's 16 holds input j (low bits) and input j + 16.
BLOCK = 32


class PackedWeight(NamedTuple):
    """INT8_ROWS: codes int8 (O, I), scale float32 (O, 1), no zero. INT8_GROUPS: scale float16 (O, G), no zero.

    INT4: codes uint8 (O, 16 * ceil(I / 32)), scale float16 (O, G), zero uint8 (O, G), 0 to 15.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    in_features: int
    group_size: int  # a multiple of 32; in_features where a row is one group
    format: WeightFormat
    activation_bits: int = 8  # to which a product of many rows may round its input; 16: not at all
    decode_activation_bits: int = 16  # the same of up to eight rows and codes of 4 bits, on the CPU

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight it stands for."""
        return self.codes.shape[0], self.in_features

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes, self.scale) if self.zero is None else (self.codes, self.scale, self.zero)

    def rows(self, index: slice | Tensor) -> PackedWeight:
        """The same for some outputs."""
        zero = None if self.zero is None else self.zero[index]
        return self._replace(codes=self.codes[index], scale=self.scale[index], zero=zero)


def packed_format(bits: int, group_size: int | None) -> WeightFormat:
    """Of codes of 8 or 4 bits with a scale a group of inputs, or (None, 8 bits) a row."""
    if bits == 4:
        return WeightFormat.INT4
    return WeightFormat.INT8_ROWS if group_size is None else WeightFormat.INT8_GROUPS


def unpack(packed: PackedWeight) -> Tensor:
    """The codes, one an element: int8 (O, I)."""
    if packed.format != WeightFormat.INT4:
        return packed.codes
    blocks = packed.codes.view(len(packed.codes), -1, BLOCK // 2)
    codes = torch.cat((blocks & 15, blocks >> 4), dim=-1)
    return codes.view(len(packed.codes), -1)[:, : packed.in_features].to(torch.int8)


def pack(codes: Tensor) -> Tensor:
    """The inverse for 4 bits: codes (O, I) of 0 to 15 -> uint8 (O, 16 * ceil(I / 32))."""
    codes = F.pad(codes.to(torch.uint8), (0, -codes.shape[1] % BLOCK))
    low, high = codes.view(len(codes), -1, 2, BLOCK // 2).unbind(2)
    return (low | high << 4).flatten(1)


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (O, I), computed in float32 and rounded once to `dtype`."""
    codes = unpack(packed).float()
    O, I = packed.shape
    if packed.scale.shape[1] == 1:
        codes = codes if packed.zero is None else codes - packed.zero.float()
        return (codes * packed.scale.float()).to(dtype)
    groups = F.pad(codes, (0, -I % packed.group_size)).view(O, -1, packed.group_size)
    if packed.zero is not None:
        groups = groups - packed.zero.float()[..., None]
    return (groups * packed.scale.float()[..., None]).view(O, -1)[:, :I].to(dtype)
