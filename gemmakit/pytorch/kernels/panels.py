"""Many rows against a weight that the library's matrix product cannot read as it lies, or reads slowly.

Some of the weight's rows at a time are expanded into a panel that stays in the processor's cache, and multiplied there:
by the native product where that is the faster one in float32, else by torch's.
Axis letters: M rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.kernels.packed import PackedWeight, dequantize
from gemmakit.pytorch.shapes import Float

# A share of a large cache; smaller panels would make more, less efficient, products.
PANEL_BYTES = 4 << 20
# Rows of a panel, at least. On the way back each panel is added to all that is summed: fewer would be more of that.
MIN_ROWS, MIN_DEPTH = 64, 128

Panels = Iterator[tuple[slice, Tensor]]


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What x of this dtype is multiplied in on the CPU: itself where the processor can, and that pays, else float32."""
    return torch.float32 if dtype == torch.bfloat16 and cpu.multiplies_floats() else _torch_multiplies_in(dtype)


@lru_cache(maxsize=4)
def _torch_multiplies_in(dtype: torch.dtype) -> torch.dtype:
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known:
        return dtype
    # Emulated 16-bit products are about half as fast as float32.
    asked: Callable[[], bool] | None = getattr(torch.ops.mkldnn, known[dtype], None)
    return dtype if torch.backends.mkldnn.is_available() and asked is not None and asked() else torch.float32


def widened(dtype: torch.dtype) -> bool:
    """Whether any number of rows of this dtype are the native product's, by codes and by plain weights in 16 bits."""
    return cpu.multiplies_floats() and dtype in cpu.FORMATS and product_dtype(dtype) == torch.float32


def panels(weight: Tensor | PackedWeight, dtype: torch.dtype, at_least: int = MIN_ROWS) -> Panels:
    """(which rows, they as (rows, I) of dtype) on the weight's device, one panel after the other in the same memory."""
    O, I = weight.shape
    rows = max(at_least, PANEL_BYTES // (I * dtype.itemsize) // MIN_ROWS * MIN_ROWS)
    parts = [slice(start, min(start + rows, O)) for start in range(0, O, rows)]
    if cpu.library() is None or dtype not in cpu.FORMATS or not cpu.reads(weight):
        for part in parts:
            yield part, weight[part].to(dtype) if isinstance(weight, Tensor) else dequantize(weight.rows(part), dtype)
        return
    room = torch.empty(min(rows, O), I, dtype=dtype)
    matrix = cpu.matrix(weight)
    for part in parts:
        panel = room[: part.stop - part.start]
        cpu.expand(matrix, range(part.start, part.stop), panel)
        yield part, panel


def multiply(
    x: Float[Tensor, "M I"], weight: Float[Tensor, "O I"] | PackedWeight, bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "M O"]:
    """In x's dtype."""
    if x.device.type == "cpu" and widened(x.dtype) and len(x) and cpu.reads(weight):
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        return cpu.project(x.contiguous(), [cpu.matrix(weight, bias, 32)])[0]
    dtype = product_dtype(x.dtype) if x.device.type == "cpu" else x.dtype
    y = x.new_empty(len(x), weight.shape[0])
    wide = x.to(dtype)
    for part, panel in panels(weight, dtype):
        if bias is None and dtype == x.dtype:
            torch.mm(wide, panel.T, out=y[:, part])
        else:
            y[:, part] = F.linear(wide, panel, None if bias is None else bias[part].to(dtype))
    return y


def multiply_back(gradient: Float[Tensor, "M O"], weight: Float[Tensor, "O I"] | PackedWeight) -> Float[Tensor, "M I"]:
    """gradient @ weight, in its dtype, summed over the panels in float32."""
    dtype = product_dtype(gradient.dtype) if gradient.device.type == "cpu" else gradient.dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = gradient.new_zeros(len(gradient), weight.shape[1], dtype=wide)
    for part, panel in panels(weight, dtype, MIN_DEPTH):
        if dtype == wide:
            total.addmm_(gradient[:, part].to(dtype), panel)
        else:
            total += gradient[:, part] @ panel
    return total.to(gradient.dtype)
