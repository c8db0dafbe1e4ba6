"""Attention of a decoding step: norm, rotate, write to the cache and attend in one kernel; another joins the parts.

The query heads that share a kv head stand as rows of one small matrix, with the S new positions: each key is read
once for all of them. The keys before the new ones are divided among SPLITS programs; how many there are is read on the
device, so a captured graph serves every length. The first program takes the new keys too, which it has in registers:
nobody reads what another one writes in the same launch. Source: arXiv:1911.02150, arXiv:2307.08691.

Axis letters: B batch, S new positions, T key positions, N heads, K kv heads, G = N // K, H head_dim, P pages a row.
"""

# A kernel is compiled from its source by Triton: its names are tensors of the device, which Python's types do not tell.
# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from call to call: a kernel made for one of their values would be made again.
_CHANGING = ["start", "last", "table_stride", "mask_row", "mask_query", "blind_row", "blind_query"]


@triton.jit
def normed(x, factor, norm_ptr, h, H: tl.constexpr, OFFSET: tl.constexpr):
    """Features h of rows x, RMSNorm's, rounded. factor: (rows, 1)."""
    weight = tl.load(norm_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * factor * (OFFSET + weight)).to(x.dtype)


@triton.jit
def turned(
    x_ptr, at, cos, sin, h, mask, norm_ptr, eps, H: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """The rows at offsets `at`, with NORM normed, rotated as layers.rotate rounds: both products, then their sum.

    (rows, HP).
    """
    x = tl.load(x_ptr + at + h, mask=mask, other=0.0)
    across = (h + H // 2) % H
    other = tl.load(x_ptr + at + across, mask=mask, other=0.0)
    if NORM:
        wide = x.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / H + eps)[:, None]
        x = normed(x, factor, norm_ptr, h, H, OFFSET)
        other = normed(other, factor, norm_ptr, across, H, OFFSET)
    other = other.to(tl.float32)
    other = tl.where(h < H // 2, -other, other)
    straight = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    crossed = (other * sin).to(x.dtype).to(tl.float32)
    return (straight + crossed).to(x.dtype)


@triton.jit
def held_before(places_ptr, b, start, S: tl.constexpr, PLACED: tl.constexpr, PAGE: tl.constexpr):
    """How many keys of row b stand before the new ones."""
    if PAGE:
        return (tl.load(places_ptr + b) - S).to(tl.int32)
    elif PLACED:
        return tl.load(places_ptr).to(tl.int32)
    else:
        return start


@triton.jit
def hidden_before(before, last, S: tl.constexpr):
    """How many of those keys nobody sees, where only the last so many are seen, the S new ones among them."""
    return tl.maximum(before + S - last, 0)


@triton.jit
def keys_a_split(before, SPLITS: tl.constexpr, BT: tl.constexpr):
    """Whole tiles of BT, at least one."""
    return tl.maximum(tl.cdiv(tl.cdiv(before, SPLITS), BT), 1) * BT


@triton.jit
def rows_of_cache(
    table_ptr, b, kv, t, mask, row_stride, head_stride, table_stride,
    K: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Where the keys of places t (1-D) begin, in elements: int64, a column."""
    if PAGE:
        page = tl.load(table_ptr + b * table_stride + t // PAGE, mask=mask, other=0).to(tl.int64)
        return (((page * PAGE + t % PAGE) * K + kv) * H)[:, None]
    else:
        return b.to(tl.int64) * row_stride + kv * head_stride + t[:, None].to(tl.int64) * H


@triton.jit
def softmax_step(acc, top, total, scores, values):
    """Take more scores (rows, n) in base 2 and values (n, HP) into a running softmax. Source: arXiv:1805.02867."""
    raised = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    base = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, raised, total


@triton.jit
def tanh(x):
    """Beyond 0.3 nothing cancels that matters; below, the series to x^9 leaves 5e-8 of it."""
    z = x * x
    near = x * (1.0 - z * (1 / 3 - z * (2 / 15 - z * (17 / 315 - z * (62 / 2835)))))
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def scores_of(q, k, scale, softcap, mask_ptr, mask_at, t, seen, MASK: tl.constexpr, CAPPED: tl.constexpr):
    """q (rows, HP), k (n, HP) at places t (n,) -> (rows, n) in base 2, -inf where a row may not look. seen: bool."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        scores = softcap * tanh(scores / softcap)
    if MASK:
        seen = seen & (tl.load(mask_ptr + mask_at + t[None, :], mask=seen, other=0) != 0)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def angles(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def append(
    k_ptr, v_ptr, cos_ptr, sin_ptr, norm_ptr, eps, keys_ptr, values_ptr, at, b, kv, j, h, table_row, writes,
    S: tl.constexpr, K: tl.constexpr, H: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Norm and rotate the new keys, write them and the new values to `at` if that is up to this program, and give both.

    (len(j), HP) each.
    """
    mask = (j < S)[:, None] & (h < H)
    table = b * table_row + j[:, None] * H + h
    new = (((b * S + j) * K + kv) * H)[:, None]
    cos, sin = angles(cos_ptr, table, mask), angles(sin_ptr, table, mask)
    k = turned(k_ptr, new, cos, sin, h, mask, norm_ptr, eps, H, NORM, OFFSET)
    v = tl.load(v_ptr + new + h, mask=mask, other=0.0)
    tl.store(keys_ptr + at, k, mask=mask & writes)
    tl.store(values_ptr + at, v, mask=mask & writes)
    return k, v


@triton.jit(do_not_specialize=_CHANGING)
def attend(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, keys_ptr, values_ptr, mask_ptr, blind_ptr,
    places_ptr, table_ptr, out_ptr, partial_ptr, top_ptr, total_ptr,
    start, last, scale, softcap, q_eps, k_eps,
    table_row, row_stride, head_stride, table_stride, mask_row, mask_query, blind_row, blind_query,
    S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BR: tl.constexpr,
    BT: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr, BLIND: tl.constexpr,
    CAUSAL: tl.constexpr, PLACED: tl.constexpr, PAGE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    CAPPED: tl.constexpr, WHOLE_MASK: tl.constexpr, OFFSET: tl.constexpr = 1.0,
):  # fmt: skip
    """q (B, S, N, H), k and v (B, S, K, H), not rotated; cos, sin (B or 1, S, H); q_norm, k_norm (H,), by
    OFFSET + which they multiply.

    Grid: B * K, SPLITS, the blocks of BR of the G * S rows.
    keys, values: (B, K, capacity, H), or with PAGE (pages, PAGE, K, H) and a table (B, P) of pages. The places of the
    new keys begin at `start`, at *places (PLACED), or at lengths[b] - S (PAGE). last: of the keys, the new ones among
    them, only the last so many are seen. scale, softcap: times log2(e). mask: int8, true where a query may look, its
    first column the first key that is seen, or with WHOLE_MASK the first of all; without a mask all are seen, or with
    CAUSAL no new key that comes later. HP: H padded.
    Writes out (B, S, N, H), or for each split its unnormalised part, greatest score and sum.
    """
    b, kv, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    before = held_before(places_ptr, b, start, S, PLACED, PAGE)
    hidden = hidden_before(before, last, S)
    chunk = keys_a_split(before - hidden, SPLITS, BT)
    first = hidden + split * chunk
    if (split > 0) & (first >= before):
        return
    G: tl.constexpr = N // K
    r, h = tl.program_id(2) * BR + tl.arange(0, BR), tl.arange(0, HP)[None, :]
    s = r % S
    real = (r < G * S)[:, None] & (h < H)
    table = b * table_row + s[:, None] * H + h
    row = ((b * S + s) * N + kv * G + r // S)[:, None]
    cos, sin = angles(cos_ptr, table, real), angles(sin_ptr, table, real)
    q = turned(q_ptr, row * H, cos, sin, h, real, q_norm_ptr, q_eps, H, Q_NORM, OFFSET)
    mask_at = b * mask_row + s[:, None] * mask_query - (0 if WHOLE_MASK else hidden)

    top = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, HP), tl.float32)
    end = tl.minimum(first + chunk, before)
    for tile in tl.range(first, end, BT, num_stages=STAGES):
        t = tile + tl.arange(0, BT)
        at = rows_of_cache(table_ptr, b, kv, t, t < end, row_stride, head_stride, table_stride, K, H, PAGE) + h
        inside = (t < end)[:, None] & (h < H)
        k = tl.load(keys_ptr + at, mask=inside, other=0.0)
        v = tl.load(values_ptr + at, mask=inside, other=0.0)
        scores = scores_of(q, k, scale, softcap, mask_ptr, mask_at, t, (t < end)[None, :], MASK, CAPPED)
        acc, top, total = softmax_step(acc, top, total, scores, v)

    if split == 0:
        j = tl.arange(0, 16)
        new_t = before + j
        new_at = rows_of_cache(table_ptr, b, kv, new_t, j < S, row_stride, head_stride, table_stride, K, H, PAGE) + h
        writes = tl.program_id(2) == 0
        new_k, new_v = append(
            k_ptr, v_ptr, cos_ptr, sin_ptr, k_norm_ptr, k_eps, keys_ptr, values_ptr, new_at, b, kv, j, h, table_row,
            writes, S, K, H, K_NORM, OFFSET,
        )  # fmt: skip
        seen = (j < S)[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= s[:, None])
        new_scores = scores_of(q, new_k, scale, softcap, mask_ptr, mask_at, new_t, seen, MASK, CAPPED)
        acc, top, total = softmax_step(acc, top, total, new_scores, new_v)

    if SPLITS == 1:
        y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        if BLIND:
            blind = tl.load(blind_ptr + b * blind_row + s * blind_query) != 0
            y = tl.where(blind[:, None], 0.0, y)
        tl.store(out_ptr + row * H + h, y.to(out_ptr.dtype.element_ty), mask=real)
    else:
        part = row * SPLITS + split
        tl.store(partial_ptr + part.to(tl.int64) * H + h, acc, mask=real)
        one = (r < G * S)[:, None]
        tl.store(top_ptr + part, top[:, None], mask=one)
        tl.store(total_ptr + part, total[:, None], mask=one)


@triton.jit(do_not_specialize=["start", "last", "blind_row", "blind_query"])
def join(
    partial_ptr, top_ptr, total_ptr, out_ptr, blind_ptr, places_ptr, start, last, blind_row, blind_query,
    S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr,
    BS: tl.constexpr, BLIND: tl.constexpr, PLACED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Grid (B * S * N,): the parts of one query head, weighted by what their greatest scores say. BS parts at a time.

    SPLITS and BT are those of `attend`, from which the number of parts follows.
    """
    row = tl.program_id(0)
    b, s = row // (S * N), row // N % S
    before = held_before(places_ptr, b, start, S, PLACED, PAGE)
    shown = before - hidden_before(before, last, S)
    used = tl.maximum(tl.cdiv(shown, keys_a_split(shown, SPLITS, BT)), 1)
    split, h = tl.arange(0, SPLITS), tl.arange(0, HP)[None, :]
    tops = tl.load(top_ptr + row * SPLITS + split, mask=split < used, other=float("-inf"))
    totals = tl.load(total_ptr + row * SPLITS + split, mask=split < used, other=0.0)
    greatest = tl.max(tops, 0)
    greatest = tl.where(greatest == float("-inf"), 0.0, greatest)
    total = tl.sum(tl.exp2(tops - greatest) * totals, 0)
    y = tl.zeros((HP,), tl.float32)
    for first in range(0, used, BS):
        i = first + tl.arange(0, BS)
        weight = tl.exp2(tl.load(top_ptr + row * SPLITS + i, mask=i < used, other=float("-inf")) - greatest)
        at = (row * SPLITS + i)[:, None].to(tl.int64) * H + h
        part = tl.load(partial_ptr + at, mask=(i < used)[:, None] & (h < H), other=0.0)
        y += tl.sum(part * weight[:, None], 0)
    y = y / tl.where(total == 0.0, 1.0, total)
    if BLIND:
        y = tl.where(tl.load(blind_ptr + b * blind_row + s * blind_query) != 0, 0.0, y)
    h = tl.arange(0, HP)
    tl.store(out_ptr + row * H + h, y.to(out_ptr.dtype.element_ty), mask=h < H)
