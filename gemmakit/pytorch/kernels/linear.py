"""x @ weight.T + bias, the seam through which every projection and the head go.

The reference is torch's linear, of a packed weight once it is dequantized. A few rows against a large weight, which is
what a decoding step is, go through a kernel that reads the weight once, in its own format, for all rows: on the CPU the
native one, on a GPU Triton's. On the CPU more rows of bfloat16 go through it too where the processor has tiles or
multiplies pairs of them, and all in float32 where its 16-bit products are emulated or slow (`panels`): with gradients
(`wide`) as without.

With a packed weight, the native kernel computes with the codes as they lie and with x rounded to 16 bits in blocks of
32 (cpu/inputs.h bounds the error), or with codes of 4 bits to the weight's `decode_activation_bits`. More rows than
eight are multiplied by tiles, as they come in bfloat16, where the processor has those; in bytes, with x rounded to 8
bits in blocks of 32, where it is fast at that, gradients are off and the weight's `activation_bits` are 8; else with
panels of the weight, expanded in turn. Under `batch_invariant` the number of rows decides nothing: x meets every weight
by the native kernels, and codes in `activation_bits`.
Axis letters: M rows, O outputs, I inputs.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.dtypes import dtype_name
from gemmakit.native.ids import WeightFormat
from gemmakit.pytorch.kernels import cpu, triton
from gemmakit.pytorch.kernels.cpu import MAX_ROWS
from gemmakit.pytorch.kernels.decision import Decision
from gemmakit.pytorch.kernels.invariance import are_rows_alike, is_batch_invariant
from gemmakit.pytorch.kernels.packed import PackedWeight
from gemmakit.pytorch.kernels.panels import multiply, multiply_back, product_dtype, widened
from gemmakit.pytorch.kernels.triton import launch
from gemmakit.pytorch.kernels.wide import linear_wide, widens
from gemmakit.pytorch.shapes import Float

# Smaller weights stay in the processor's caches, where torch is as good and the call costs more than it saves.
MIN_WEIGHT = 1 << 20
# The same where torch only emulates products of 16 bits: what is smaller costs little in any way.
MIN_EMULATED = 1 << 16
# Types of devices that the Triton kernel is for.
GPU = {"cuda"}
# Rows of bfloat16 up to which the kernel beats torch where it multiplies pairs (benchmarks/products.py).
PAIR_ROWS = 32
# The same where it has tiles: 1.1 to 1.4 times as fast up to these, 0.9 times beyond.
TILE_ROWS = 256
# Bits of codes -> rows up to which reading them once for every eight costs less than expanding them.
FEW_ROWS = {8: 16, 6: 16, 5: 16, 4: 24}


def linear(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*rows O"]:
    """In x's dtype, summed in float32."""
    if weight.device.type in GPU and not torch.is_grad_enabled() and _few_on_gpu(x, weight):
        return torch.ops.gemmakit.linear_rows(x, weight, bias)
    if (
        weight.dtype in cpu.FORMATS
        and not torch.is_grad_enabled()
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        # Before the row count, on which a compiled graph would depend, and what is asked of the native library.
        and not torch.compiler.is_compiling()
        and not _is_small(weight)
        and (
            x.numel() <= _reach(weight, x.dtype).at_once * weight.shape[1]
            or product_dtype(x.dtype) != x.dtype
            or is_batch_invariant()
        )
        and weight.is_contiguous()
        and cpu.library() is not None
    ):
        return torch.ops.gemmakit.linear_rows(x, weight, bias)
    return linear_wide(x, weight, bias) if widens(x, weight) else F.linear(x, weight, bias)


def _is_small(weight: Tensor) -> bool:
    """Whether torch multiplies by it for its size."""
    return weight.numel() < MIN_WEIGHT and not are_rows_alike() and not takes_any_rows(weight, weight.dtype)


def _few_on_gpu(x: Tensor, weight: Tensor) -> bool:
    """Whether the Triton kernel multiplies: a few rows, a large weight, both plain and of one of its dtypes."""
    return (
        weight.numel() >= MIN_WEIGHT
        and x.dtype == weight.dtype
        and x.dtype in triton.DTYPES
        and not torch.compiler.is_compiling()  # before the row count, as below
        and 0 < x.numel() <= triton.MAX_ROWS * weight.shape[1]
        and weight.is_contiguous()
        and not torch.is_autocast_enabled(weight.device.type)
        and triton.available(weight.device)
    )


def linear_packed(
    x: Float[Tensor, "*rows I"], packed: PackedWeight, bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*rows O"]:
    """In x's dtype; packed: (O, I) of weights.

    Gradients reach x and the bias.
    """
    codes, scale, zero, in_features, group_size, format, *rounded = packed
    many, few = (16, 16) if torch.is_grad_enabled() else rounded
    facts = in_features, group_size, int(format), many, few
    return torch.ops.gemmakit.linear_packed(x, codes, scale, zero, bias, *facts)


def takes_many(packed: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether many rows of this dtype are multiplied in bytes, with x rounded to 8 bits in blocks of 32."""
    return packed.activation_bits == 8 and cpu.multiplies_bytes(packed, dtype)


def takes_any_rows(weight: Tensor | PackedWeight, dtype: torch.dtype) -> bool:
    """Whether `cpu.project` is the product of any number of rows of this dtype, with activation_bits of 0."""
    if isinstance(weight, PackedWeight):
        if cpu.multiplies_tiles(dtype):
            return True
        in_bytes = cpu.multiplies_bytes(weight, dtype)
        return weight.activation_bits == 8 if in_bytes else widened(dtype)
    return weight.numel() >= MIN_EMULATED and dtype != torch.float32 and widened(dtype)


class Reach(NamedTuple):
    """Up to how many rows x meets a weight in one call of `cpu.project`, and in several for at most MAX_ROWS each."""

    at_once: int
    in_pieces: int


def _reach(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Reach:
    """Beyond it a library's product is faster: of panels, or torch's own."""
    if takes_any_rows(weight, dtype):
        return Reach(sys.maxsize, sys.maxsize)
    if isinstance(weight, PackedWeight):
        return Reach(MAX_ROWS, FEW_ROWS[weight.bits])
    in_pairs = dtype == torch.bfloat16 and cpu.multiplies_pairs()
    at_once = TILE_ROWS if cpu.multiplies_tiles(dtype) else PAIR_ROWS if in_pairs else MAX_ROWS
    # Emulated products lose to a second reading of the weight.
    return Reach(at_once, at_once if product_dtype(dtype) == dtype else 2 * MAX_ROWS)


def linear_plan(weight: Tensor | PackedWeight) -> Decision:
    """Which form a decoding step takes for this weight, and why."""
    return _packed_plan(weight) if isinstance(weight, PackedWeight) else _plain_plan(weight)


def _plain_plan(weight: Tensor) -> Decision:
    device, known, kernel = weight.device, cpu.FORMATS, "native"
    if device.type in GPU:
        known, kernel = triton.DTYPES, "Triton"
    elif device.type != "cpu":
        return Decision(f"torch on {device.type}")
    torch_ = f"torch on {device.type}" if device.type in GPU else "torch"
    if weight.dtype not in known:
        return Decision(torch_, f"{dtype_name(weight.dtype)} has no {kernel} kernel")
    if device.type == "cpu" and is_batch_invariant():
        return Decision(torch_, cpu.decision().why) if cpu.library() is None else cpu.decision()
    if weight.numel() < MIN_WEIGHT if device.type in GPU else _is_small(weight):
        few = f"{weight.numel():,} weights"
        return Decision(torch_, f"{few} are few" if device.type in GPU else f"{few} fit the caches")
    if device.type not in GPU:
        return cpu.decision()
    why = triton.decision(device).why
    return Decision(torch_, why) if why else Decision(f"Triton, without gradients, up to {triton.MAX_ROWS} rows")


def _packed_plan(packed: PackedWeight) -> Decision:
    device, kind = packed.codes.device, f"int{packed.bits}"
    if device.type in GPU:
        why = triton.decision(device).why or ("" if packed.bits in triton.BITS else f"no Triton kernel reads {kind}")
        if why:
            return Decision(f"torch on {device.type}, {kind} expanded", why)
        return Decision(f"Triton {kind}, up to {launch.constants(device).dequantize_above} rows; beyond that expanded")
    if device.type != "cpu":
        return Decision(f"torch on {device.type}, {kind} expanded")
    if cpu.library() is None:
        return Decision(f"torch, {kind} expanded", cpu.decision().why)
    if not cpu.reads(packed):
        return Decision(f"torch, {kind} expanded", f"no kernel reads scales of {dtype_name(packed.scale.dtype)}")
    many = f"; beyond {FEW_ROWS[packed.bits]} rows in float32" if cpu.multiplies_floats() else ""
    many = "; beyond 8 rows activations in 8 bits" if takes_many(packed, torch.float32) else many
    if packed.bits == 4 and packed.decode_activation_bits == 8:
        many = "; activations in 8 bits"
    if cpu.multiplies_tiles(torch.bfloat16):
        many = f"{many}{',' if many else ';'} beyond {MAX_ROWS} rows of bfloat16 by tiles"
    many = f"; activations in {packed.activation_bits} bits" if is_batch_invariant() else many
    return Decision(f"native {cpu.instruction_set()} {kind}{many}")


# -- plain weights -----------------------------------------------------------------------------------------------------


def _linear_rows_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    try:
        return launch.linear(x, weight.detach(), bias)
    except triton.Refused:
        return F.linear(x, weight, bias)


def _linear_rows(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "*rows O"]:
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == 0:
        return x.new_empty(shape)
    return _on_cpu(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias).view(shape)


def _on_cpu(
    x: Float[Tensor, "M I"], weight: Float[Tensor, "O I"] | PackedWeight, bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "M O"]:
    """What the native kernels take, by them as far as they reach."""
    if len(x) <= MAX_ROWS or is_batch_invariant() or len(x) <= (reach := _reach(weight, x.dtype)).at_once:
        return _native(x, weight, bias)
    if len(x) > reach.in_pieces:
        return multiply(x, weight, bias)
    pieces = x.tensor_split(-(-len(x) // MAX_ROWS))  # none much smaller than the others
    return torch.cat([_native(piece, weight, bias) for piece in pieces])


def _native(
    x: Float[Tensor, "M I"], weight: Float[Tensor, "O I"] | PackedWeight, bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "M O"]:
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    bits = weight.activation_bits if isinstance(weight, PackedWeight) and is_batch_invariant() else 0
    return cpu.project(x, [cpu.matrix(weight, bias, bits)])[0]


# Torch operators rather than bare calls, so that dispatch modes, fake tensors and profilers see them.
_ops = torch.library.Library("gemmakit", "FRAGMENT")
_ops.define("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_ops.impl("linear_rows", _linear_rows, "CPU")
_ops.impl("linear_rows", _linear_rows_on_gpu, "CUDA")


def _linear_rows_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.register_fake("gemmakit::linear_rows", _linear_rows_shape)


# -- packed weights ----------------------------------------------------------------------------------------------------


def _linear_packed(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    group_size: int,
    format: int,
    activation_bits: int,
    decode_activation_bits: int,
) -> Tensor:
    facts = in_features, group_size, format, activation_bits, decode_activation_bits
    packed = _contiguous(codes, scale, zero, *facts)
    shape = (*x.shape[:-1], len(codes))
    flat = x.reshape(-1, in_features).contiguous()
    if flat.numel() == 0 or len(codes) == 0:
        return x.new_zeros(shape) if bias is None else x.new_zeros(shape) + bias
    on = _packed_on_gpu if x.device.type in GPU else multiply
    if x.device.type == "cpu":
        if cpu.library() is None:
            _warn_once()
        elif x.dtype in cpu.FORMATS and cpu.reads(packed):
            on = _on_cpu
    return on(flat, packed, bias).view(shape)


def _packed_on_gpu(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    if x.dtype in triton.DTYPES and packed.bits in triton.BITS and triton.available(x.device):
        with suppress(triton.Refused):
            return launch.linear(x, packed, bias)
    return multiply(x, packed, bias)


@lru_cache(maxsize=1)
def _warn_once() -> None:
    warnings.warn(
        f"gemmakit: quantized weights are expanded for every product, which is slow: {cpu.decision().why}.",
        stacklevel=3,
    )


def _contiguous(codes: Tensor, scale: Tensor, zero: Tensor | None, *facts: int) -> PackedWeight:
    """The kernels read rows without gaps. facts: PackedWeight's fields after the tensors."""
    in_features, group_size, format, *rounded = facts
    zero = None if zero is None else zero.contiguous()
    codes, scale = codes.contiguous(), scale.contiguous()
    return PackedWeight(codes, scale, zero, in_features, group_size, WeightFormat(format), *rounded)


def _linear_packed_back(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, group_size: int, format: int
) -> Tensor:
    packed = _contiguous(codes, scale, zero, in_features, group_size, format)
    flat = gradient.reshape(-1, len(codes))
    return multiply_back(flat, packed).view(*gradient.shape[:-1], in_features)


_weight = "Tensor codes, Tensor scale, Tensor? zero"
_facts = "int in_features, int group_size, int format"
_rounded = "int activation_bits, int decode_activation_bits"
_ops.define(f"linear_packed(Tensor x, {_weight}, Tensor? bias, {_facts}, {_rounded}) -> Tensor")
_ops.define(f"linear_packed_back(Tensor gradient, {_weight}, {_facts}) -> Tensor")
_ops.impl("linear_packed", _linear_packed, "CompositeExplicitAutograd")
_ops.impl("linear_packed_back", _linear_packed_back, "CompositeExplicitAutograd")


def _packed_shape(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _packed_shape_back(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, group_size: int, format: int
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero, bias, *ctx.facts, _, _ = inputs
    ctx.save_for_backward(codes, scale, zero)
    ctx.biased = bias is not None


def _differentiate_packed(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero = ctx.saved_tensors
    for_x = for_bias = None
    if ctx.needs_input_grad[0]:
        for_x = torch.ops.gemmakit.linear_packed_back(gradient, codes, scale, zero, *ctx.facts)
    if ctx.biased and ctx.needs_input_grad[4]:
        for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return for_x, None, None, None, for_bias, None, None, None, None, None


torch.library.register_fake("gemmakit::linear_packed", _packed_shape)
torch.library.register_fake("gemmakit::linear_packed_back", _packed_shape_back)
torch.library.register_autograd("gemmakit::linear_packed", _differentiate_packed, setup_context=_keep_packed)
