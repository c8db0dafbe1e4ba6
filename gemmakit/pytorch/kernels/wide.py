"""Products with plain 16-bit weights in training, where those of the processor are emulated or slow: in float32, with
gradients.

Where they are emulated torch's own are a fifth as fast as float32, and the product with a weight that is not
transposed, which the way back is made of, two hundred times slower. The weight is expanded panel by panel, so that no
copy of it is made, and sums are rounded once. Axis letters: M rows, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemmakit.pytorch.kernels.panels import multiply, multiply_back, product_dtype
from gemmakit.pytorch.kernels.training import is_dense, transformed
from gemmakit.pytorch.shapes import Float


def widens(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_wide` takes the place of torch's linear while gradients are on."""
    return (
        torch.is_grad_enabled()
        and _emulated(weight)
        and is_dense((x, weight), weight.device)
        and x.dtype == weight.dtype
        and weight.is_contiguous()
        and not transformed()
    )


def linear_wide(x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, (*rows, O) in x's dtype."""
    return torch.ops.gemmakit.linear_wide(x, weight, bias)


def _linear_wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def multiply_plain_back(gradient: Float[Tensor, "M O"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "M I"]:
    """gradient @ weight, by torch's product where that is one."""
    return multiply_back(gradient, weight) if _emulated(weight) else gradient @ weight


def multiply_across(gradient: Float[Tensor, "M O"], x: Float[Tensor, "M I"]) -> Float[Tensor, "O I"]:
    """gradient.T @ x, in float32 where torch's product is emulated."""
    return gradient.float().mT @ x.float() if _emulated(x) else gradient.mT @ x


def _emulated(tensor: Tensor) -> bool:
    return tensor.is_cpu and not torch.compiler.is_compiling() and product_dtype(tensor.dtype) != tensor.dtype


def _back(gradient: Tensor, weight: Tensor) -> Tensor:
    return multiply_back(gradient.reshape(-1, len(weight)), weight).view(*gradient.shape[:-1], weight.shape[1])


def _weight_back(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient.T @ x of all rows, (O, I), some of its rows at a time."""
    flat, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    made = x.new_empty(flat.shape[1], rows.shape[1])
    for part, columns in zip(made.split(_ROWS), flat.split(_ROWS, dim=1), strict=True):
        part.copy_(multiply_across(columns, rows))
    return made


_ROWS = 1024
_ops = torch.library.Library("gemmakit", "FRAGMENT")
_ops.define("linear_wide(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_ops.define("linear_wide_back(Tensor gradient, Tensor weight) -> Tensor")
_ops.define("linear_wide_weight_back(Tensor gradient, Tensor x) -> Tensor")
_ops.impl("linear_wide", _linear_wide, "CPU")
_ops.impl("linear_wide_back", _back, "CPU")
_ops.impl("linear_wide_weight_back", _weight_back, "CPU")


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted, again = ctx.needs_input_grad, torch.is_grad_enabled()  # again: the gradient is to be differentiated
    for_x = for_weight = for_bias = None
    if wanted[0]:
        for_x = gradient @ weight if again else torch.ops.gemmakit.linear_wide_back(gradient, weight)
    if wanted[1] and again:
        for_weight = gradient.reshape(-1, gradient.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
    elif wanted[1]:
        for_weight = torch.ops.gemmakit.linear_wide_weight_back(gradient, x)
    if ctx.biased and wanted[2]:
        for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return for_x, for_weight, for_bias


torch.library.register_fake("gemmakit::linear_wide", lambda x, w, bias: x.new_empty(*x.shape[:-1], w.shape[0]))
torch.library.register_fake("gemmakit::linear_wide_back", lambda g, w: g.new_empty(*g.shape[:-1], w.shape[1]))
torch.library.register_fake("gemmakit::linear_wide_weight_back", lambda g, x: x.new_empty(g.shape[-1], x.shape[-1]))
torch.library.register_autograd("gemmakit::linear_wide", _differentiate, setup_context=_keep)
