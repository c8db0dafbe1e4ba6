"""PackedWeight weights with any codes, and how far a product with rounded activations may be from the exact one."""

import torch
import torch.nn.functional as F

from gemmakit.native.ids import WeightFormat
from gemmakit.pytorch.kernels.packed import PackedWeight, dequantize, pack, packed_format, unpack

# name -> (bits, group size; None: one float32 scale a row)
SCHEMES = {"int8": (8, None), "int8-32": (8, 32), "int8-96": (8, 96), "int4-32": (4, 32), "int4-128": (4, 128),
           "int4-64": (4, 64), "int4-row": (4, 1 << 20), "int5-32": (5, 32), "int5-96": (5, 96), "int6-32": (6, 32),
           "int6-128": (6, 128)}  # fmt: skip
# Of a scheme: up to eight rows are rounded to 8 bits.
A8 = "-a8"
STEPS = [*SCHEMES, *(scheme + A8 for scheme, (bits, _) in SCHEMES.items() if bits == 4)]


def random_packed(scheme, O, I, seed=0):
    """Every code, zero and a wide range of scales occur."""
    bits, group = SCHEMES[scheme.removesuffix(A8)]
    g = torch.Generator().manual_seed(seed)
    group = I if group is None or group > I else group
    G = -(-I // group)
    scale = torch.exp(torch.randn(O, G, generator=g) * 2) * 0.01
    if bits > 4:
        codes = torch.randint(-1 << bits - 1, 1 << bits - 1, (O, I), generator=g, dtype=torch.int8)
        by_row = SCHEMES[scheme][1] is None
        format = packed_format(bits, SCHEMES[scheme][1])
        return PackedWeight(pack(codes, bits), scale if by_row else scale.half(), None, I, group, format)
    codes = torch.randint(0, 16, (O, I), generator=g)
    zero = torch.randint(0, 16, (O, G), generator=g, dtype=torch.uint8)
    few = 8 if scheme.endswith(A8) else 16
    return PackedWeight(pack(codes), scale.half(), zero, I, group, WeightFormat.INT4, decode_activation_bits=few)


def exact(x, packed, bias=None):
    return F.linear(x.double(), dequantize(packed, torch.float64).double(), None if bias is None else bias.double())


def most_of(packed):
    """The largest whole number to which up to eight rows' activations are rounded."""
    return 127 if packed.decode_activation_bits == 8 else 32767


def room(x, packed, dtype, most=None):
    """The largest error stated, (M, O).

    Half a step of a block's activations, which are whole numbers up to `most`, for each weight, float32 sums of the
    codes' and the zeros' parts, and half a unit of the output format.
    """
    x, most = x.double(), most or most_of(packed)
    M, I = x.shape
    blocks = F.pad(x.abs(), (0, -I % 32)).view(M, -1, 32)
    step = blocks.amax(-1, keepdim=True) / (2 * most)
    step = step.expand_as(blocks).reshape(M, -1)[:, :I]
    parts = packed._replace(zero=None) if packed.zero is not None else packed
    codes = F.linear(x.abs() + step, dequantize(parts).double().abs())
    if packed.zero is not None:
        zeros = packed._replace(codes=pack(torch.zeros_like(unpack(packed))))
        codes = codes + F.linear(x.abs() + step, dequantize(zeros).double().abs())
    quantized = F.linear(step, dequantize(packed).double().abs())
    kind = torch.finfo(dtype)
    rounding = exact(x, packed).abs() * kind.eps / 2 + kind.tiny * kind.eps / 2  # the latter near zero
    # Twenty float32 roundings on the way to a block's term, one a block in the sum.
    return quantized * 1.001 + codes * (I / 32 + 20) * 2.0**-24 + rounding * 1.01 + 1e-30
