"""What the kernels compute, in plain torch: the same roundings, sums in float32. Names as the kernels have them.

Each step that a module rounds to its dtype is rounded here; what lies between is float32. Axis letters: M rows,
O outputs, I inputs, B batch, S positions, N heads, K kv heads, H head_dim, T key positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.native.ids import Activation
from gemmakit.pytorch.kernels.packed import PackedWeight, dequantize
from gemmakit.pytorch.shapes import Bool, Float


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.GELU_TANH: gelu_tanh,
    Activation.GELU_ERF: F.gelu,
    Activation.RELU: F.relu,
    Activation.SILU: F.silu,
}
# By the function itself: a wrapper of it is another, which goes through torch.
ACTIVATION_OF = {function: Activation(number) for number, function in ACTIVATIONS.items()}
# Of the gradient to what they give, and what they were given.
_ACTIVATIONS_BACK: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    Activation.GELU_TANH: lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    Activation.GELU_ERF: torch.ops.aten.gelu_backward,
    Activation.RELU: lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
    Activation.SILU: torch.ops.aten.silu_backward,
}


def rms_norm(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, " D"], eps: float, gain: float = 1.0, offset: float = 1.0
) -> Float[Tensor, "*rows D"]:
    """x * rsqrt(mean(x^2) + eps) * (offset + weight) * gain in float32, then rounded to x's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (offset + weight.float()) * gain).to(x.dtype)


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """What rms_norm multiplies the rows of x (..., D) by: (...) float32."""
    return torch.rsqrt(x.float().pow(2).mean(-1) + eps)


def rms_norm_saving(x: Tensor, weight: Tensor, eps: float, offset: float = 1.0) -> tuple[Tensor, Tensor]:
    """The norm, and what its way back needs."""
    return rms_norm(x, weight, eps, offset=offset), rms_scale(x, eps)


def rms_norm_back(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, for_weight: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients to x (..., D) and to the weight (D,), or (0,) unless asked for: in float32, rounded once.

    With n = x * scale and g = gradient * (1 + weight), x's is scale * (g - n * mean(g * n)).
    """
    dy, n = gradient.float(), x.float() * scale[..., None]
    g = dy * (1.0 + weight.float())
    for_x = scale[..., None] * (g - n * (g * n).mean(-1, keepdim=True))
    sums = (dy * n).reshape(-1, x.shape[-1]).sum(0) if for_weight else dy.new_empty(0)
    return for_x.to(x.dtype), sums.to(weight.dtype)


def gated(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"], act: int) -> Float[Tensor, "*rows F"]:
    """act(gate) * up, the activation and the product rounded."""
    return ACTIVATIONS[act](gate) * up


def gated_back(gradient: Tensor, gate: Tensor, up: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """Gradients to gate and up in float32, rounded once; the activation that up meets is rounded as in `gated`."""
    dy = gradient.float()
    for_gate = _ACTIVATIONS_BACK[act](dy * up.float(), gate.float())
    return for_gate.to(gate.dtype), (dy * ACTIVATIONS[act](gate).float()).to(up.dtype)


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in float32 from the weight's exact values, rounded once to x's dtype."""
    exact = weight.float() if isinstance(weight, Tensor) else dequantize(weight)
    return F.linear(x.float(), exact, None if bias is None else bias.float()).to(x.dtype)


def gate_up(x: Tensor, gate: Tensor | PackedWeight, up: Tensor | PackedWeight, act: int) -> Tensor:
    """act(x @ gate.T) * (x @ up.T), both projections, the activation and the product rounded. x is normalised."""
    activated = ACTIVATIONS[act](linear(x, gate).float()).to(x.dtype)
    return activated * linear(x, up)


def rotate(
    x: Float[Tensor, "B _ _ H"], cos: Float[Tensor, "#B _ _ H"], sin: Float[Tensor, "#B _ _ H"]
) -> Float[Tensor, "B _ _ H"]:
    """Rotary embedding in the half-split layout: feature i turns with feature i + H/2.

    x: (B, heads, S, H), or (B, S, heads, H); cos, sin: the same with 1 for heads, and B or 1.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def attend(
    q: Float[Tensor, "B S N H"],
    keys: Float[Tensor, "B T K H"],
    values: Float[Tensor, "B T K H"],
    seen: Bool[Tensor, "#B S T"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "B S N H"]:
    """Of rotated queries; scores, their cap and softmax in float32.

    A query that sees nothing gets zeros.
    """
    groups = q.shape[2] // keys.shape[2]
    k, v = (x.float().repeat_interleave(groups, 2) for x in (keys, values))
    scores = torch.einsum("bsnh,btnh->bnst", q.float(), k) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bnst,btnh->bsnh", weights, v).to(q.dtype)
