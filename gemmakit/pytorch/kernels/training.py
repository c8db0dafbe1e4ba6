"""What lies between the matrix products of a training step, fused and differentiable: RMSNorm and act(gate) * up.

Torch operators, so that checkpointing, dispatch modes and profilers see them. On a GPU they are Triton kernels, which
read and write each tensor once and save only what came in, where the modules' own lines start a dozen kernels and save
float32 copies; elsewhere they are plain torch. Axis letters: D hidden, F mlp.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.native.ids import Activation
from gemmakit.pytorch.kernels import reference, triton
from gemmakit.pytorch.kernels.decision import Decision
from gemmakit.pytorch.kernels.triton import launch

# Types of devices on which the modules call the operators.
DEVICES = {"cuda"}
_DENSE = (Tensor, nn.Parameter)


def fuses(*tensors: Tensor) -> bool:
    """Whether the operators take the place of a module's own lines, which without gradients nothing does here.

    A compiler fuses those lines itself, and func transforms, forward differentiation and tracing want torch's own
    operations. Asked at every call: well below a microsecond where the answer is no.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(tensors[0]) not in _DENSE:
        return False
    device = tensors[0].device
    return (
        device.type in DEVICES
        and triton.available(device)
        and not transformed()
        and (is_dense(tensors, device) and all(t.dtype in triton.DTYPES for t in tensors))
    )


def transformed() -> bool:
    """Whether operations are traced, or run under func transforms or forward differentiation."""
    return (
        torch._C._functorch.maybe_current_level() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
        or torch._C._is_tracing()
    )


def is_dense(tensors: tuple[Tensor, ...], device: torch.device) -> bool:
    """Whether they are plain memory of this device."""
    return all(type(t) in _DENSE and t.device == device for t in tensors)


def training_plan(device: torch.device | str | None = None) -> Decision:
    """Which form norm and gate take on `device` (default: the current GPU) while gradients are on."""
    why = triton.decision(torch.device("cuda" if device is None else device)).why
    return Decision("modules", why) if why else Decision("Triton: RMSNorm and gate, forward and backward")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * (1 + weight) in float32, then rounded. x: (..., D), weight: (D,) -> like x."""
    return torch.ops.gemmakit.rms_norm(x, weight, eps)[0]


def gated(gate: Tensor, up: Tensor, act: Activation) -> Tensor:
    """act(gate) * up, each step rounded. gate, up: (..., F) -> (..., F). act: an Activation.

    What projections gave that are not alike, as an adapter on one of them may leave them, goes through torch.
    """
    if gate.dtype == up.dtype and gate.shape == up.shape and fuses(gate, up):
        return torch.ops.gemmakit.gated(gate, up, act)
    return reference.ACTIVATIONS[act](gate) * up


def _compute(name: str, first: Tensor, *rest: Any) -> Any:
    """An operator by its kernel where that runs, by its plain form elsewhere."""
    if first.device.type in DEVICES and first.dtype in triton.DTYPES and triton.available(first.device):
        with suppress(triton.Refused):
            return getattr(launch, name)(first, *rest)
    return getattr(reference, name)(first, *rest)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _compute("rms_norm_saving", x, weight, eps)


def _rms_norm_back(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, for_weight: bool
) -> tuple[Tensor, Tensor]:
    return _compute("rms_norm_back", gradient, x, weight, scale, for_weight)


def _gated(gate: Tensor, up: Tensor, act: int) -> Tensor:
    return _compute("gated", gate, up, act)


def _gated_back(gradient: Tensor, gate: Tensor, up: Tensor, act: int) -> tuple[Tensor, Tensor]:
    return _compute("gated_back", gradient, gate, up, act)


_ops = torch.library.Library("gemmakit", "FRAGMENT")
# The second output of the norm is what its rows were multiplied by, which the way back needs: float32.
_ops.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_ops.define(
    "rms_norm_back(Tensor gradient, Tensor x, Tensor weight, Tensor scale, bool for_weight) -> (Tensor, Tensor)"
)
_ops.define("gated(Tensor gate, Tensor up, int act) -> Tensor")
_ops.define("gated_back(Tensor gradient, Tensor gate, Tensor up, int act) -> (Tensor, Tensor)")
_ops.impl("rms_norm", _rms_norm, "CompositeExplicitAutograd")
_ops.impl("rms_norm_back", _rms_norm_back, "CompositeExplicitAutograd")
_ops.impl("gated", _gated, "CompositeExplicitAutograd")
_ops.impl("gated_back", _gated_back, "CompositeExplicitAutograd")


def _rms_norm_shapes(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rms_norm_back_shapes(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, for_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if for_weight else 0)


def _gated_shape(gate: Tensor, up: Tensor, act: int) -> Tensor:
    return gate.new_empty(gate.shape)


def _gated_back_shapes(gradient: Tensor, gate: Tensor, up: Tensor, act: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


torch.library.register_fake("gemmakit::rms_norm", _rms_norm_shapes)
torch.library.register_fake("gemmakit::rms_norm_back", _rms_norm_back_shapes)
torch.library.register_fake("gemmakit::gated", _gated_shape)
torch.library.register_fake("gemmakit::gated_back", _gated_back_shapes)


def _keep_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_norm(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None
    x, weight, scale = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    if torch.is_grad_enabled():  # the gradient is to be differentiated again, which the plain form can
        for_x, for_weight = reference.rms_norm_back(gradient, x, weight, reference.rms_scale(x, ctx.eps), wanted)
    else:
        for_x, for_weight = torch.ops.gemmakit.rms_norm_back(gradient, x, weight, scale, wanted)
    return for_x, for_weight if wanted else None, None


def _keep_gate(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    gate, up, ctx.act = inputs
    ctx.save_for_backward(gate, up)


def _differentiate_gate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    gate, up = ctx.saved_tensors
    back = reference.gated_back if torch.is_grad_enabled() else torch.ops.gemmakit.gated_back
    for_gate, for_up = back(gradient, gate, up, ctx.act)
    return for_gate, for_up, None


torch.library.register_autograd("gemmakit::rms_norm", _differentiate_norm, setup_context=_keep_norm)
torch.library.register_autograd("gemmakit::gated", _differentiate_gate, setup_context=_keep_gate)
