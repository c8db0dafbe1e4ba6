"""Torch tensors in, kernels started, torch tensors out. Their plain forms are in reference.

Axis letters: M rows (B * S), O outputs, I inputs, G groups a row, B batch, S new positions, N heads, K kv heads,
H head_dim, T key positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.native.ids import WeightFormat
from gemmakit.pytorch.kernels import reference
from gemmakit.pytorch.kernels.packed import FORMATS, PackedWeight
from gemmakit.pytorch.kernels.triton import MAX_ROWS, interpreted, starting, tuning

T = TypeVar("T")
# Of Gemma 4's full layers heads are 512 wide, whose numbers the registers do not hold, however they are divided.
MAX_HEAD_DIM = 256
UNLIMITED = 2**31 - 1  # keys that are seen, where all are
# A program of the norm keeps a row in its registers, of its backward three rows and the sums: longer ones would spill,
# and go through torch. This and what follows is reasoned, not measured.
MAX_DIM = 8192
# Programs of the norm's backward: four a multiprocessor of an H100, which keeps 32 KB on their way. The same number
# everywhere, so that the sums for the weight are the same on every device.
PROGRAMS = 512
# Elements a program of the gate takes: 16 a thread.
GATE_BLOCK, GATE_WARPS = 2048, 4


@functools.cache
def _kernels() -> dict[str, Any]:
    """The files of kernels: the one place that needs the triton package."""
    from gemmakit.pytorch.kernels.triton import attention, dequantize, gemv, rowwise

    return {"attention": attention, "dequantize": dequantize, "gemv": gemv, "rowwise": rowwise}


def _start(kernel: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel, "file.function", on the device of its first argument.

    Raises Refused where it cannot be compiled or started.
    """
    file, _, name = kernel.partition(".")
    with starting(arguments[0].device):
        getattr(_kernels()[file], name)[grid](*arguments, **constants)


@functools.cache
def constants(device: torch.device) -> tuning.Tuning:
    return tuning.tuning(None if interpreted() else torch.cuda.get_device_capability(device))


class Operand(NamedTuple):
    """A weight as a kernel takes it."""

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    O: int
    I: int
    format: WeightFormat
    group: int


class Shape(NamedTuple):
    """What `block_constants` reads of an Operand."""

    I: int
    format: WeightFormat
    group: int = 1


def operand(weight: Tensor | PackedWeight) -> Operand:
    """Raises InputError for a packed weight that no kernel reads."""
    O, I = weight.shape
    if isinstance(weight, Tensor):
        return Operand(weight.contiguous(), None, None, O, I, FORMATS[weight.dtype], 1)
    if (weight.bits == 4) != (weight.zero is not None):
        raise InputError(
            f"a weight of {weight.bits} bits comes {'with' if weight.bits == 8 else 'without'} zeros: "
            "4 bits have zeros, 8 bits have none; use packed.dequantize."
        )
    codes, scale = weight.codes.contiguous(), weight.scale.contiguous()
    codes = codes.view(torch.int32) if weight.format == WeightFormat.INT4 else codes
    group = 1 if weight.format == WeightFormat.INT8_ROWS else weight.group_size
    return Operand(codes, scale, None if weight.zero is None else weight.zero.contiguous(), O, I, weight.format, group)


def alike(operands: Sequence[Operand]) -> bool:
    """Whether one launch takes them all."""
    return len({(w.format, w.group, w.I) for w in operands}) == 1


class Norm(NamedTuple):
    """x * rsqrt(mean(x^2) + eps) * (offset + weight) * gain."""

    weight: Tensor
    eps: float
    gain: float = 1.0
    offset: float = 1.0


def block_constants(
    table: tuning.Tuning, w: Operand | Shape, rows: int, itemsize: int, share: int = 1
) -> dict[str, int]:
    """The constants of a launch: block sizes, cut down to what the matrix has.

    rows: of x; itemsize: bytes of an element of x; share: weights that a program reads side by side.
    """
    R = min(1 << (rows - 1).bit_length(), MAX_ROWS)
    packed = table.int4 if w.format == WeightFormat.INT4 else table.int8
    blocks = (packed if w.format.is_packed else table.plain)[R]
    most = blocks.inputs * 2 // itemsize  # the tables are for 16 bits
    BI = min(most, max(1 << (w.I - 1).bit_length(), 32))
    run = 16 if w.format.is_packed else 16 // itemsize
    return dict(I=w.I, R=R, BO=max(blocks.outputs // share, 1), BI=BI, C=run, FORMAT=int(w.format), GROUP=w.group,
                STAGES=blocks.stages, num_warps=blocks.warps)  # fmt: skip


def project(
    x: Tensor,
    weights: Sequence[Operand],
    biases: Sequence[Tensor | None],
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """(residual +) norm(x) @ weight.T + bias for each of up to three weights alike. x: (M, I) -> (M, O) each.

    The norm is rounded to x's dtype, then the projection, then the sum with the residual (M, O).
    """
    M, x, one = len(x), x.contiguous(), weights[0]
    ys = [x.new_empty(M, w.O) for w in weights]
    if not M:
        return ys
    bias = any(b is not None for b in biases)
    if bias:
        biases = [x.new_zeros(w.O) if b is None else b for b, w in zip(biases, weights, strict=True)]
    three = [*range(len(weights)), *[0] * (3 - len(weights))]
    shape = block_constants(constants(x.device), one, M, x.element_size())
    grid = (sum(-(-w.O // shape["BO"]) for w in weights), -(-M // shape["R"]))
    _start(
        "gemv.project",
        grid,
        x,
        x if norm is None else norm.weight,
        x if residual is None else residual.contiguous(),
        0.0 if norm is None else norm.eps,
        M,
        *[weights[i].codes for i in three],
        *[_or(weights[i].scale, x) for i in three],
        *[_or(weights[i].zero, x) for i in three],
        *[_or(biases[i], x) for i in three],
        *[ys[i] for i in three],
        *[weights[i].O for i in three],
        NORM=norm is not None,
        RESIDUAL=residual is not None,
        BIAS=bias,
        WEIGHTS=len(weights),
        OFFSET=1.0 if norm is None else norm.offset,
        **shape,
    )
    return ys


def _or(t: T | None, other: T) -> T:
    return other if t is None else t


def gate_up(
    x: Tensor, norm: Norm, gate: Operand, up: Operand, biases: tuple[Tensor | None, Tensor | None], act: int
) -> Tensor:
    """act(norm(x) @ gate.T) * (norm(x) @ up.T), each step rounded to x's dtype. x: (M, I), M <= MAX_ROWS -> (M, O)."""
    M, x = len(x), x.contiguous()
    y = x.new_empty(M, gate.O)
    if not M:
        return y
    shape = block_constants(constants(x.device), gate, M, x.element_size(), share=2)
    bias = any(b is not None for b in biases)
    b0, b1 = (x if not bias else x.new_zeros(gate.O) if b is None else b for b in biases)
    _start(
        "gemv.gate_up", (-(-gate.O // shape["BO"]),), x, norm.weight, norm.eps, M, gate.codes, up.codes,
        _or(gate.scale, x), _or(up.scale, x), _or(gate.zero, x), _or(up.zero, x), b0, b1, y, gate.O, BIAS=bias,
        ACT=int(act), OFFSET=norm.offset, **shape,
    )  # fmt: skip
    return y


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; not differentiable. x: (..., I), weight: (O, I) -> (..., O) in x's dtype.

    A packed weight is read as it is by up to `dequantize_above` rows; more take it written out in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(weight, PackedWeight) and len(flat) > constants(x.device).dequantize_above:
        return F.linear(x, expand(weight, x.dtype), bias)
    return project(flat, [operand(weight)], [bias])[0].view(*x.shape[:-1], weight.shape[0])


def expand(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """packed.dequantize on the device: (O, I), computed in float32, rounded once."""
    w = operand(packed)
    y = torch.empty(w.O, w.I, dtype=dtype, device=w.codes.device)
    G, BO, BI = packed.scale.shape[1], 4, 1024
    group = packed.group_size if G > 1 else w.I
    sizes = dict(I=w.I, G=G, GROUP=group, BO=BO, BI=BI)
    grid = (-(-w.O // BO), -(-w.I // BI))
    assert w.scale is not None
    if w.zero is None:
        _start("dequantize.expand8", grid, w.codes, w.scale, y, w.O, **sizes)
    else:
        _start("dequantize.expand4", grid, w.codes.view(torch.uint8), w.scale, w.zero, y, w.O, **sizes)
    return y


class Room(NamedTuple):
    """Where keys and values lie, and where the new ones go.

    keys, values: (B, K, capacity, H) with H contiguous, or with a table (B, P) of pages (pages, page_size, K, H).
    start: the first new place, for rows alike; or places: int64 on the device, its first element (with a table: a
    number a row, tokens with the new ones). most: keys there can be before the new ones, as far as the host knows.
    """

    keys: Tensor
    values: Tensor
    start: int = 0
    places: Tensor | None = None
    table: Tensor | None = None
    most: int = 0


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    room: Room,
    head_dim: int,
    scale: float,
    mask: Tensor | None = None,
    blind: Tensor | None = None,
    causal: bool = False,
    *,
    last: int | None = None,
    reach: int | None = None,
    softcap: float | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> Tensor:
    """Norm and rotate q and k, write k and v to their places, attend to all up to there. q: (B, S, N * H), as given.

    k, v: (B, S, K * H), S at most 16. tables: cos and sin (B or 1, 1, S, H). The S new places follow each other.
    mask: bool (B or 1, 1, S or 1, T); blind: bool (B or 1, 1, S or 1, 1), queries that get zeros. causal: without a
    mask, whether a new position sees no later one. last: of all keys only the last so many are seen, and the mask's
    columns are theirs; reach: the same with a mask of all keys. softcap: scores times scale are capped,
    softcap * tanh(s / softcap). q_norm, k_norm: of a head.
    """
    (B, S, width), H = q.shape, head_dim
    N, K = width // H, k.shape[2] // H
    q, k, v, (cos, sin) = q.contiguous(), k.contiguous(), v.contiguous(), (t.contiguous() for t in tables)
    out, paged = torch.empty_like(q), room.table is not None
    fixed = attention_constants(constants(q.device), S, N, K, H, q.element_size(), paged)
    tile = fixed["BT"]
    last = _or(last, _or(reach, UNLIMITED))
    # Of the keys there are, not of those seen: a window that is passed makes no other kernel, and idle programs end.
    parts = tuning.splits(constants(q.device).attention_programs, B * K, tile, max(room.most, 1))
    partial = q.new_empty(B * S * N * parts * (H + 2) if parts > 1 else 0, dtype=torch.float32)
    acc, top, total = partial.split([B * S * N * parts * H, *[B * S * N * parts] * 2]) if parts > 1 else [partial] * 3
    page = 0 if room.table is None else room.keys.shape[1]
    places = _or(room.places, q)
    flags = dict(BLIND=blind is not None, PLACED=room.places is not None, PAGE=page, SPLITS=parts)
    norms = [Norm(q, 0.0) if norm is None else norm for norm in (q_norm, k_norm)]
    offset = next((norm.offset for norm in (q_norm, k_norm) if norm is not None), 1.0)
    log2e = math.log2(math.e)
    grid = (B * K, parts, -(-(N // K * S) // fixed["BR"]))
    _start(
        "attention.attend", grid, q, k, v, cos, sin, *[norm.weight for norm in norms], room.keys, room.values,
        _bytes(mask, q), _bytes(blind, q), places, _or(room.table, q), out, acc, top, total,
        room.start, last, scale * log2e, (softcap or 0.0) * log2e, *[norm.eps for norm in norms],
        S * H if cos.shape[0] > 1 else 0, *room.keys.stride()[:2],
        0 if room.table is None else room.table.stride(0), *_steps(mask), *_steps(blind),
        MASK=mask is not None, CAUSAL=causal and mask is None, CAPPED=softcap is not None,
        WHOLE_MASK=reach is not None, Q_NORM=q_norm is not None, K_NORM=k_norm is not None, OFFSET=offset, **fixed,
        **flags,
    )  # fmt: skip
    if parts > 1:
        shared = {name: fixed[name] for name in ("S", "N", "H", "HP", "BT")}
        _start(
            "attention.join", (B * S * N,), acc, top, total, out, _bytes(blind, q), places, room.start, last,
            *_steps(blind),
            BS=min(parts, 16), **shared, **flags,
        )  # fmt: skip
    return out


def attention_constants(
    table: tuning.Tuning, S: int, N: int, K: int, H: int, itemsize: int, paged: bool = False
) -> dict[str, int]:
    """The constants of an attention launch. More rows than 32 to a program would not fit its registers."""
    HP, BR = max(1 << (H - 1).bit_length(), 16), 16 if N // K * S <= 16 else 32
    # The addresses of pages take registers: with as many rows there is room for those of half a tile.
    BT = table.key_tile * 2 // itemsize // (2 if paged and BR > 16 else 1)
    return dict(S=S, N=N, K=K, H=H, HP=HP, BR=BR, BT=max(BT, 16), STAGES=table.key_stages,
                num_warps=BR // 4)  # fmt: skip


def _bytes(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask.view(torch.int8)


def _steps(mask: Tensor | None) -> tuple[int, int]:
    """From row to row and from query to query of a mask (B or 1, 1, S or 1, ...), in elements."""
    if mask is None:
        return 0, 0
    return mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2) if mask.shape[2] > 1 else 0


# -- norm and gate, forward and backward: M rows, D hidden, F mlp ------------------------------------------------------


def norm_constants(D: int) -> dict[str, int]:
    """16 elements of a row to a thread."""
    block = max(1 << (D - 1).bit_length(), 32)
    return dict(D=D, BLOCK=block, num_warps=min(max(block // 512, 1), 16))


def rms_norm_saving(x: Tensor, weight: Tensor, eps: float, offset: float = 1.0) -> tuple[Tensor, Tensor]:
    """x: (..., D), weight: (D,) -> the norm in x's dtype, and what its rows were scaled by: (...) float32."""
    if x.shape[-1] > MAX_DIM:
        return reference.rms_norm_saving(x, weight, eps, offset)
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _start_norm(x, Norm(weight, eps, offset=offset), None, y, scale)
    return y, scale


def norm_add(x: Tensor, norm: Norm, residual: Tensor) -> Tensor:
    """residual + norm(x), (..., D), each step rounded to x's dtype."""
    if x.shape[-1] > MAX_DIM:
        return residual + reference.rms_norm(x, *norm)
    x, y = x.contiguous(), torch.empty_like(residual, memory_format=torch.contiguous_format)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _start_norm(x, norm, residual.contiguous(), y, scale)
    return y


def _start_norm(x: Tensor, norm: Norm, residual: Tensor | None, y: Tensor, scale: Tensor) -> None:
    tensors = (x, norm.weight.contiguous(), _or(residual, x), y, scale)
    shape = norm_constants(x.shape[-1])
    flags = dict(RESIDUAL=residual is not None, OFFSET=norm.offset)
    _start_rows("rowwise.norm", scale.numel(), *tensors, norm.eps, norm.gain, **flags, **shape)


def rms_norm_back(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """What the gradient (..., D) of the norm is to x, (..., D), and to the weight: (D,), or (0,) unless asked for."""
    if x.shape[-1] > MAX_DIM:
        return reference.rms_norm_back(gradient, x, weight, scale, for_weight)
    gradient, x, M, D = gradient.contiguous(), x.contiguous(), scale.numel(), x.shape[-1]
    programs = min(M, PROGRAMS)
    dx = torch.empty_like(x)
    sums = x.new_empty((programs if for_weight else 0, D), dtype=torch.float32)
    tensors = (gradient, x, weight.contiguous(), scale.contiguous(), dx, sums)
    _start_rows("rowwise.norm_back", programs, *tensors, M, FOR_WEIGHT=for_weight, **norm_constants(D))
    return dx, sums.sum(0).to(weight.dtype) if for_weight else weight.new_empty(0)


def gated(gate: Tensor, up: Tensor, act: int) -> Tensor:
    """act(gate) * up, (..., F) like both."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _start_gate("rowwise.gated", (gate, up, y), act)
    return y


def gated_back(gradient: Tensor, gate: Tensor, up: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """What the gradient (..., F) of the product is to gate and to up."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
    _start_gate("rowwise.gated_back", (gradient, gate, up, for_gate, for_up), act)
    return for_gate, for_up


def _start_gate(kernel: str, tensors: Sequence[Tensor], act: int) -> None:
    n = tensors[0].numel()
    _start_rows(kernel, -(-n // GATE_BLOCK), *tensors, n, ACT=int(act), BLOCK=GATE_BLOCK, num_warps=GATE_WARPS)


def _start_rows(kernel: str, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        _start(kernel, (programs,), *arguments, **constants)
