"""The native CPU kernels (gemmakit/native) for tensors; native.h says what each takes.

Nothing here copies or repacks: a `Matrix` points into the tensors it was made of, which
must outlive it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gemmakit import native
from gemmakit.native import instruction_set, library
from gemmakit.native.ids import Activation, WeightFormat
from gemmakit.pytorch.kernels.decision import Decision
from gemmakit.pytorch.kernels.packed import FORMATS, PackedWeight

MAX_ROWS = 8
# Of the gate; others go through torch.
ACTIVATIONS = (Activation.GELU_TANH, Activation.RELU, Activation.SILU)
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Matrix(ctypes.Structure):
    """native.h's Matrix."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("few_bits", ctypes.c_int32),
        ("out", _LONG),
        ("in_", _LONG),
        ("codes", _POINTER),
        ("scale", _POINTER),
        ("zero", _POINTER),
        ("bias", _POINTER),
        ("turned", ctypes.c_int32),
    )


class Norm(ctypes.Structure):
    """native.h's Norm; without arguments, no norm."""

    _fields_ = (
        ("weight", _POINTER),
        ("format", ctypes.c_int32),
        ("eps", _FLOAT),
        ("gain", _FLOAT),
        ("offset", _FLOAT),
    )


_LONGS = ("B", "S", "N", "K", "H", "first", "T", "start", "capacity", "table_row", "mask_row", "mask_query",
          "blind_row", "blind_query")  # fmt: skip
_POINTERS = ("q", "k", "v", "cos", "sin", "keys", "values", "y", "mask", "blind")
_INTS = ("format", "causal", "threads")


class Attention(ctypes.Structure):
    """native.h's Attention."""

    _fields_ = (
        *((name, _LONG) for name in _LONGS),
        *((name, _POINTER) for name in _POINTERS),
        *((name, Norm) for name in ("q_norm", "k_norm", "v_norm")),
        *((name, ctypes.c_int32) for name in _INTS),
        *((name, _FLOAT) for name in ("scale", "softcap")),
        *((name, _POINTER) for name in ("pages", "starts", "lengths")),
        *((name, _LONG) for name in ("page_count", "page_size", "window", "forgotten")),
    )


def decision() -> Decision:
    """Which native kernels there are, or why none."""
    isa = instruction_set()
    return Decision("torch", f"native kernel {native.absence()}") if isa is None else Decision(f"native {isa}")


def reads(weight: Tensor | PackedWeight) -> bool:
    """Whether the kernels take this weight: what packed.py says of its parts, on the CPU, without gaps."""
    if isinstance(weight, Tensor):
        return weight.dtype in FORMATS and weight.device.type == "cpu" and weight.is_contiguous()
    by_row = weight.format == WeightFormat.INT8_ROWS
    known = weight.scale.dtype == (torch.float32 if by_row else torch.float16)
    return known and all(t.device.type == "cpu" and t.is_contiguous() for t in weight.tensors)


def matrix(weight: Tensor | PackedWeight, bias: Tensor | None = None, activation_bits: int = 0) -> Matrix:
    """What the kernels know of a weight (O, I) and its bias (O,): contiguous tensors on the CPU, bias in x's dtype.

    activation_bits: to which x is rounded against codes, for any number of rows: 16 or 8, or 32 for not at all; or 0
    for none beyond MAX_ROWS of bfloat16 where the processor has tiles, 8 where it is fast at that, else 32 beyond 16
    rows, and up to those 16, or with 4-bit codes the weight's `decode_activation_bits`.
    """
    bias_at = None if bias is None else bias.data_ptr()
    O, I = weight.shape
    if isinstance(weight, Tensor):
        return Matrix(FORMATS[weight.dtype], 0, 0, 0, O, I, weight.data_ptr(), None, None, bias_at)
    zero_at = None if weight.zero is None else weight.zero.data_ptr()
    group = min(weight.group_size, 2**31 - 1)
    at = weight.codes.data_ptr(), weight.scale.data_ptr(), zero_at, bias_at
    return Matrix(weight.format, group, activation_bits, weight.decode_activation_bits, O, I, *at)


def multiplies_bytes(packed: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether `project` rounds x of this dtype to 8 bits for more than MAX_ROWS rows where it is not told their
    activation_bits: this processor is fast at products of bytes by this weight, and at no better ones.
    """
    found = library()
    if found is None or dtype not in FORMATS:
        return False
    one = (Matrix * 1)(matrix(packed))
    return found.gemmakit_project(one, 1, FORMATS[dtype], None, MAX_ROWS + 1, None, None, 1) == 0


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Whether `project` multiplies rows of this dtype by tiles: any number of them, by its weights and by codes."""
    return dtype == torch.bfloat16 and instruction_set() == "amx"


def multiplies_floats() -> bool:
    """Whether `project` is the fastest product of any number of rows, in float32, by plain weights and by codes: the
    processor has no products in 16 bits, or slow ones (dispatch.cpp), and torch's in float32 want hundreds of rows
    (benchmarks/products.py).
    """
    return instruction_set() in ("avx2", "avxvnni", "avx512", "avx512vnni")


def multiplies_pairs() -> bool:
    """Whether `project` is fast at tens of rows of bfloat16, in pairs; torch is faster on processors with tiles."""
    # A rule, not a race at the first use: which one runs decides bits, and those must not depend on who won.
    return instruction_set() == "avx512bf16" and not _has_tiles()


@lru_cache(maxsize=1)
def _has_tiles() -> bool:
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and asked()


def project(x: Tensor, matrices: Sequence[Matrix], residual: Tensor | None = None) -> list[Tensor]:
    """x (..., I), contiguous -> each matrix's (..., O) in x's dtype; to a single one residual is added.

    Any number of rows, though not always as the fastest product that there is of so many.
    """
    found = library()
    assert found is not None
    count = len(matrices)
    ys = [x.new_empty(*x.shape[:-1], m.out) for m in matrices]
    failed = found.gemmakit_project(
        (Matrix * count)(*matrices),
        count,
        FORMATS[x.dtype],
        x.data_ptr(),
        x.numel() // x.shape[-1],
        (_POINTER * count)(*(y.data_ptr() for y in ys)),
        None if residual is None else residual.data_ptr(),
        torch.get_num_threads(),
    )
    assert not failed, f"project takes rows of 1 to 16 weights' common input, got {tuple(x.shape)}"
    return ys


def attend_pages(
    q: Tensor,
    store: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    new: Sequence[Tensor] = (),
    norms: Sequence[Norm] = (),
) -> Tensor:
    """Attention of rows that lie end to end in q (S, N, H), over their pages; each query alone, to the bit.

    store: (2, pages, page_size, K, H), keys and values. table: (B, P) int64, the pages of each row in order. starts:
    (B + 1,) int64, where the rows begin in q, and S. lengths: (B,) int64, tokens of each with the new ones. window: of
    these a query sees the newest so many, up to itself; None for all.

    new: the keys (S, K, H) and values that are still to be written to the pages, and cos and sin (S, H) by which these
    keys and q are turned before; without them q is turned and the pages hold all. norms: of the heads of q, k and v.
    All of q's dtype, contiguous.
    """
    found = library()
    assert found is not None
    (S, N, H), (_, _, size, K, _) = q.shape, store.shape
    y = torch.empty_like(q)
    keys, values = store[0].data_ptr(), store[1].data_ptr()
    k, v, cos, sin = (t.data_ptr() for t in new) if new else (None, None, None, None)
    q_norm, k_norm, v_norm = norms or (Norm(), Norm(), Norm())
    B, P = table.shape
    call = Attention(
        B=B, S=S, N=N, K=K, H=H, q=q.data_ptr(), k=k, v=v, cos=cos, sin=sin, keys=keys, values=values, y=y.data_ptr(),
        q_norm=q_norm, k_norm=k_norm, v_norm=v_norm, format=FORMATS[q.dtype], causal=1,
        threads=torch.get_num_threads(), scale=scale, softcap=softcap or 0.0, pages=table.data_ptr(),
        starts=starts.data_ptr(), lengths=lengths.data_ptr(), page_count=P, page_size=size, window=window or 0,
    )  # fmt: skip
    failed = found.gemmakit_attend(ctypes.byref(call))
    assert not failed, f"attend takes rows that end within their pages, got {S} positions, {P} pages of {size} a row"
    return y


def expand(m: Matrix, rows: range, to: Tensor) -> None:
    """Some rows of a weight, dequantized into `to` (len(rows), I), contiguous, each number rounded once."""
    found = library()
    assert found is not None
    failed = found.gemmakit_expand(
        ctypes.byref(m), rows.start, rows.stop, FORMATS[to.dtype], to.data_ptr(), torch.get_num_threads()
    )
    assert not failed, f"expand takes rows within 0 to {m.out}, got {rows}"


def read_memory(buffer: Tensor) -> int:
    """Read every byte once, as fast as the memory (or, the first time, the disk behind a mapped file) gives them.

    Returns their sum as 64-bit words, so that nothing can leave the reading out.
    """
    found = library()
    if found is None:
        return int(buffer.view(torch.uint8).sum())
    total = ctypes.c_uint64()
    found.gemmakit_read_memory(buffer.data_ptr(), buffer.nbytes, ctypes.byref(total), torch.get_num_threads())
    return total.value
