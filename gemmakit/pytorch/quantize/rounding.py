"""From a weight to codes, scales and zeros: rounding that keeps the squared error small, a few rows at a time.

Axis letters: O outputs, I inputs, G groups a row, E inputs a group.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.errors import CheckpointError
from gemmakit.pytorch.kernels import PackedWeight
from gemmakit.pytorch.kernels.packed import code_range, pack, packed_format
from gemmakit.quantization import stored_parts

# Numbers that are worked on together: few enough for a core's cache, in which every pass but the first then finds them.
CHUNK = 1 << 18
# On an accelerator few enough for its memory: 128 MB in float32, of which about ten are needed.
DEVICE_CHUNK = 1 << 25
# Ranges to try, as shares of a group's own: outliers are few, and finer steps for the rest may be worth clipping them.
# Of more bits clipping gains little, and a grid that happens to meet the numbers, finer or wider, as much.
SHARES_4_BITS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74)
SHARES = (1.06, 1.03, 1.0, 0.97, 0.94, 0.91, 0.88, 0.85)
SMALLEST = 2.0**-24  # of float16, above zero


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    *,
    device: torch.device | None = None,
    name: str = "the weight",
    importance: Tensor | None = None,
) -> PackedWeight:
    """Round a weight (O, I) of any float dtype to `bits`, with a scale a row or a group of inputs.

    Works through the rows piece by piece, so beside the result it takes a few MB.

    Args:
        bits: 8, 6, 5 or 4.
        group_size: 32 or 128; None with 8 bits for a scale a row.
        device: where to compute and to leave the result; by default where the weight is.
        name: for the message of CheckpointError, raised for NaN, infinity and values beyond float16's scales.
        importance: (I,) of at least 0; how much the error at each input counts. By default all alike.
    """
    device = weight.device if device is None else device
    O, I = weight.shape
    out = empty(O, I, bits, group_size, device)
    importance = None if importance is None else importance.to(device, torch.float32)

    def work(rows: slice, piece: Tensor) -> None:
        scale, zero = _scales(piece, bits, group_size, importance, name, rows)
        out.scale[rows] = scale
        if out.zero is not None and zero is not None:
            out.zero[rows] = zero
        out.codes[rows] = encode(piece, bits, scale, zero, group_size)

    _by_pieces(weight, device, work)
    return out


def tables_of(weight: Tensor, bits: int, group_size: int | None, name: str) -> tuple[Tensor, Tensor | None]:
    """The scales and zeros of `quantize` without the codes."""
    O, I = weight.shape
    like = empty(O, I, bits, group_size, "meta")
    # Made before the work: small results between large temporary ones would leave the heap in pieces.
    scales = torch.empty_like(like.scale, device=weight.device)
    zeros = None if like.zero is None else torch.empty_like(like.zero, device=weight.device)

    def work(rows: slice, piece: Tensor) -> None:
        scales[rows], zero = _scales(piece, bits, group_size, None, name, rows)
        if zeros is not None and zero is not None:
            zeros[rows] = zero

    _by_pieces(weight, weight.device, work)
    return scales, zeros


def codes_of(weight: Tensor, bits: int, group_size: int | None, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The codes of `quantize`, given the scales (O, G) and zeros that it found."""
    O, I = weight.shape
    codes = empty(O, I, bits, group_size, weight.device).codes

    def work(rows: slice, piece: Tensor) -> None:
        codes[rows] = encode(piece, bits, scale[rows], None if zero is None else zero[rows], group_size)

    _by_pieces(weight, weight.device, work)
    return codes


def _by_pieces(weight: Tensor, device: torch.device, work: Callable[[slice, Tensor], None]) -> None:
    """Call `work` with some rows at a time, as float32 on `device`; on the CPU with a piece a thread.

    Threads of torch's own would meet after every short operation, and wait there for one that another program holds up.
    """
    step = max(1, (CHUNK if device.type == "cpu" else DEVICE_CHUNK) // weight.shape[1])
    slices = [slice(begin, begin + step) for begin in range(0, len(weight), step)]

    @torch.no_grad()
    def call(rows: slice) -> None:
        work(rows, weight[rows].to(device, torch.float32))

    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1 or len(slices) == 1:
        for rows in slices:
            call(rows)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in pool.map(call, slices):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads to come begin with


def _scales(
    piece: Tensor, bits: int, group_size: int | None, importance: Tensor | None, name: str, rows: slice
) -> tuple[Tensor, Tensor | None]:
    scale, zero = find_scales(piece, bits, group_size, importance)
    bad = (~torch.isfinite(scale).all(1)).nonzero()
    if len(bad):
        raise CheckpointError(
            f"{name} has NaN, infinity or values too large for a float16 scale in row {rows.start + int(bad[0])}: it "
            "cannot be quantized. Name the module in modules_to_not_convert, or repair the checkpoint."
        )
    return scale, zero


def empty(O: int, I: int, bits: int, group_size: int | None, device: torch.device | str = "cpu") -> PackedWeight:
    """A PackedWeight of this size, not filled."""
    parts = {
        part: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for part, (dtype, shape) in stored_parts(O, I, bits, group_size).items()
    }
    return PackedWeight(
        parts[""],
        parts["_scale"],
        parts.get("_zero"),
        I,
        I if group_size is None else group_size,
        packed_format(bits, group_size),
    )


def find_scales(
    weight: Tensor, bits: int, group_size: int | None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """weight: (O, I) float32 -> scale (O, G) as it is stored, zero uint8 (O, G) or None. NaN in, NaN out.

    8 bits: the largest becomes 127. Fewer: of several ranges, clipped more and more, that with the smallest error
    once its scale is rounded to float16. Without zeros the scale has the sign with which the largest number becomes the
    lowest code, which reaches one further than the highest.
    """
    if group_size is None:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return torch.where(scale == 0, 1.0, scale), None
    groups = grouped(weight, group_size)
    if bits == 8:
        return _half(groups.abs().amax(2) / 127), None
    counts = None if importance is None else grouped(importance[None], group_size)
    scale, zero = _search(groups, bits, counts)
    return scale.to(torch.float16), zero.to(torch.uint8) if bits == 4 else None


def encode(weight: Tensor, bits: int, scale: Tensor, zero: Tensor | None, group_size: int | None) -> Tensor:
    """The nearest codes as they are stored. weight: (O, I) float32; scale, zero: (O, G)."""
    groups = grouped(weight, group_size)
    codes = (groups / scale.float()[..., None]).round_()
    if zero is not None:
        codes.add_(zero.float()[..., None])
    return pack(codes.clamp_(*code_range(bits)).view(len(weight), -1)[:, : weight.shape[1]], bits)


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """(O, I) -> (O, G, E), the last group of a row filled with zeros."""
    size = weight.shape[1] if group_size is None else group_size
    return F.pad(weight, (0, -weight.shape[1] % size)).view(len(weight), -1, size)


def _search(groups: Tensor, bits: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """groups: (O, G, E), counts: (1, G, E) or None -> float32 scale and zero (O, G), which without zeros is 0."""
    low, high = groups.amin(2).clamp_max_(0), groups.amax(2).clamp_min_(0)
    lowest, highest = code_range(bits)
    work = torch.empty_like(groups)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for share in SHARES_4_BITS if bits == 4 else SHARES:
        if bits == 4:
            scale = _half((high - low) * (share / highest)).float()
            zero = (low * -share / scale).round_().clamp_(lowest, highest)
        else:
            scale, zero = _half(torch.where(-low > high, low, high) * (share / lowest)).float(), torch.zeros_like(low)
        codes = _centred(groups, bits, scale, zero, work)
        error = _error(codes.mul_(scale[..., None]).sub_(groups), counts)
        best = _better(best, (error, scale, zero))
    assert best is not None
    _, scale, zero = best
    # The scale that suits the chosen codes best, by least squares: of the same sign, where there is one.
    codes = _centred(groups, bits, scale, zero, work)
    fitted = _half(_dot(codes, groups, counts).abs_() / _dot(codes, codes, counts)).float().copysign_(scale)
    error = _error(codes.mul_(fitted[..., None]).sub_(groups), counts)
    return _better(best, (error, fitted, zero))[1:]


def _better(a: tuple[Tensor, Tensor, Tensor] | None, b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of two candidates (error, scale, zero), each (O, G), the one of smaller error; the first where one is NaN."""
    if a is None:
        return b
    win = b[0] < a[0]
    return torch.where(win, b[0], a[0]), torch.where(win, b[1], a[1]), torch.where(win, b[2], a[2])


def _centred(groups: Tensor, bits: int, scale: Tensor, zero: Tensor, out: Tensor) -> Tensor:
    """The nearest codes less their zero, in `out` (O, G, E)."""
    zero = zero[..., None]
    return torch.div(groups, scale[..., None], out=out).round_().add_(zero).clamp_(*code_range(bits)).sub_(zero)


def _error(difference: Tensor, counts: Tensor | None) -> Tensor:
    """The (weighted) squared error of each group, (O, G); `difference` is overwritten."""
    return _dot(difference, difference, counts)


def _dot(a: Tensor, b: Tensor, counts: Tensor | None) -> Tensor:
    product = a * b
    return (product if counts is None else product.mul_(counts)).sum(2)


def _half(scale: Tensor) -> Tensor:
    """As float16, and never zero: all codes of a group of zeros are its zero, whatever the scale."""
    return torch.where(scale == 0, 1.0, scale.abs().clamp_min(SMALLEST).copysign(scale)).to(torch.float16)
