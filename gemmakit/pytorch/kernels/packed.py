"""A weight in 4 to 8 bits: what files hold, kernels read and modules carry, in one layout.

w[o, i] = scale[o, i // group_size] * (code[o, i] - zero[o, i // group_size]). Axis letters: O outputs, I inputs,
G = ceil(I / group_size) groups a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.native.ids import WeightFormat

# Of plain weights, and of activations.
FORMATS = {torch.bfloat16: WeightFormat.BF16, torch.float16: WeightFormat.F16, torch.float32: WeightFormat.F32}
# Codes of 4 bits lie in blocks of 32 inputs: byte j of a block's 16 holds input j (low bits) and input j + 16.
BLOCK = 32
# Of 5 and 6 bits four such blocks lie together, their low bits before their upper ones (cpu/codes.h).
FOUR = 4 * BLOCK


class PackedWeight(NamedTuple):
    """INT8_ROWS: codes int8 (O, I), scale float32 (O, 1), no zero. INT8_GROUPS: scale float16 (O, G), no zero.

    INT4: codes uint8 (O, 16 * ceil(I / 32)), scale float16 (O, G), zero uint8 (O, G), 0 to 15. INT5, INT6: codes
    uint8 (O, bits * 16 * ceil(I / 128)), scale float16 (O, G), no zero.
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
    """Of codes of so many bits with a scale a group of inputs, or (None, 8 bits) a row."""
    if bits == 8:
        return WeightFormat.INT8_ROWS if group_size is None else WeightFormat.INT8_GROUPS
    return next(kind for kind in WeightFormat if kind.is_packed and kind.bits == bits)


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and the highest code, of 8 bits those that rounding gives."""
    return {4: (0, 15), 8: (-127, 127)}.get(bits, (-1 << bits - 1, (1 << bits - 1) - 1))


def unpack(packed: PackedWeight) -> Tensor:
    """The codes, one an element: int8 (O, I)."""
    if packed.bits == 8:
        return packed.codes
    O, more = len(packed.codes), packed.bits - 4  # bits a code beside the low four
    if not more:
        blocks = packed.codes.view(O, -1, BLOCK // 2)
        codes = torch.cat((blocks & 15, blocks >> 4), dim=-1)
        return codes.view(O, -1)[:, : packed.in_features].to(torch.int8)
    fours = packed.codes.view(O, -1, FOUR * packed.bits // 8)
    low, upper = fours[..., : FOUR // 2].view(O, -1, 4, 1, 16), fours[..., FOUR // 2 :].view(O, -1, more, 1, 16)
    # Which bits of a byte: those of a block's input j, and beside them those of j + 16.
    shifts = torch.arange(0, 8, more, dtype=torch.uint8, device=fours.device).view(-1, 1)
    upper = (upper >> shifts & (1 << more) - 1).view(O, -1, 4, 2, 16)
    codes = torch.cat((low & 15, low >> 4), dim=-2) | upper << 4
    return codes.view(O, -1)[:, : packed.in_features].to(torch.int8) - (1 << packed.bits - 1)


def pack(codes: Tensor, bits: int = 4) -> Tensor:
    """The inverse: codes (O, I), whole numbers of `code_range`, as they are stored."""
    if bits == 8:
        return codes.to(torch.int8)
    O, more = len(codes), bits - 4
    if more:
        codes = codes + (1 << bits - 1)
    codes = F.pad(codes.to(torch.uint8), (0, -codes.shape[1] % (FOUR if more else BLOCK)))
    first, second = (codes & 15).view(O, -1, 2, BLOCK // 2).unbind(2)
    low = first | second << 4
    if not more:
        return low.flatten(1)
    shifts = torch.arange(0, 8, more, dtype=torch.uint8, device=codes.device).view(-1, 1)
    upper = ((codes >> 4).view(O, -1, more, len(shifts), 16) << shifts).sum(3, dtype=torch.uint8)
    return torch.cat((low.view(O, -1, FOUR // 2), upper.flatten(2)), dim=2).flatten(1)


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
