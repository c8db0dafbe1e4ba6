"""Which layers run fused, and why the others do not.

A layer that does not run fused calls its modules one by one, which is the reference, differentiable, and what hooks
and adapters see. Axis letters: B batch, S positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from gemmakit.pytorch.attention import GemmaAttention
from gemmakit.pytorch.fused import cpu, cuda
from gemmakit.pytorch.fused.reference import MAX_ROWS, FusedLayer
from gemmakit.pytorch.fused.weights import DENSE, weight_of
from gemmakit.pytorch.kernels import Decision
from gemmakit.pytorch.layers import GemmaMLP, GemmaRMSNorm, LayerParts

# By device type, what gives the form of a layer of plain modules, all of whose tensors are on that device, for
# activations like x; or says why there is none.
fused_layers: dict[str, Callable[[LayerParts, Tensor], FusedLayer | str]] = {"cpu": cpu.fuse, "cuda": cuda.fuse}


class Layer(Protocol):
    """A decoder layer that declares its parts, which depend on its modules, its attention's and its MLP's alone."""

    training: bool
    _modules: dict[str, nn.Module | None]

    def parts(self) -> LayerParts: ...


def fused_layer(layer: Layer, x: Tensor, output_attentions: bool, leaves_out: bool = False) -> FusedLayer | None:
    """The form that may run this layer on x (B, S, D), or None.

    leaves_out: whether it is to leave positions out. Where no form takes so many rows, the modules do it, seam by seam,
    if nobody watches them.

    Asked once a layer and call, so it costs a few microseconds: what changes between calls is looked at, and the rest
    is looked at again only when a module, a hook or the place of a tensor has changed.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or output_attentions or type(x) is not Tensor:
        return None
    B, S, _ = x.shape
    if not B * S or not (x.is_cpu or x.is_cuda) or _watched(x):
        return None
    found: FusionDecision | None = layer.__dict__.get("fusion")
    if found is None or not found.is_valid(x):
        found = layer.__dict__["fusion"] = FusionDecision(layer, x)
    if found.dropout and layer.training:
        return None
    if B * S > MAX_ROWS and found.form is not None and not found.form.any_rows:
        return FusedLayer(found.parts) if leaves_out else None
    return found.form


def _watched(x: Tensor) -> bool:
    """Whether somebody follows torch's own operations, which a fused form does not call: tracing, vmap, modes."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._is_tracing()
        or torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")
    )


class FusionDecision:
    """What was decided for one layer, and by which facts."""

    def __init__(self, layer: Layer, x: Tensor | None = None):
        self.parts = parts = layer.parts()
        modules = [module for _, module, _ in _named(parts)]
        # What holds the parts, and what it held: two dictionaries are compared faster than parts are collected.
        self.held = [(m._modules, dict(m._modules)) for m in (layer, parts.self_attn, parts.mlp)]
        self.owns = [m.__dict__ for m in modules]
        # The dictionaries themselves: one that fills later is seen.
        self.hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self.hooked, self.replaced = any(self.hooks), self._replaced()
        self.holders = [d for m in modules for d in (m._parameters, m._buffers) if d]
        self.tensors = self._tensors()
        self.norms = [norm for _, norm in parts.norm_modules()]
        self.settings = self._settings()
        self.dropout = getattr(parts.self_attn, "attention_dropout", 0.0) > 0
        if x is None:
            weight = getattr(parts.norms.before_attention, "weight", None)
            x = torch.empty((1, 1, 0), dtype=getattr(weight, "dtype", None), device=getattr(weight, "device", None))
        self.dtype, self.device = x.dtype, x.device
        found = self._obstacle() or self._form(x)
        self.form = None if isinstance(found, str) else found
        self.decision = Decision("modules", found) if isinstance(found, str) else found.decision

    def is_valid(self, x: Tensor) -> bool:
        """Whether all that was looked at is as it was."""
        (layer, its), (attention, own), (mlp, inner) = self.held
        if any(self.hooks) != self.hooked or layer != its or attention != own or mlp != inner:
            return False
        if getattr(self.parts.mlp, "act_fn", None) is not self.parts.act_fn:
            return False
        if x.dtype != self.dtype or x.device != self.device:
            return False
        if self._replaced() != self.replaced or self._settings() != self.settings:
            return False
        return self._tensors() == self.tensors

    def _replaced(self) -> bool:
        """Whether a module has a forward of its own, as offloading gives it one."""
        for own in self.owns:  # noqa: SIM110  any() with a generator takes three times as long
            if "forward" in own:
                return True
        return False

    def _settings(self) -> list[tuple[float | None, float | None]]:
        """Of the norms, which a form may keep."""
        return [(getattr(norm, "eps", None), getattr(norm, "offset", None)) for norm in self.norms]

    def _tensors(self) -> list[tuple[int, torch.dtype, int] | None]:
        """Where each tensor of the modules is; nothing for those that are no memory of this process."""
        return [
            (t.data_ptr(), t.dtype, t.numel()) if type(t) in DENSE else None
            for holder in self.holders
            for t in holder.values()
            if t is not None
        ]

    def _obstacle(self) -> str:
        """Why the modules must be called themselves; empty when a fused form computes the same."""
        parts = self.parts
        if parts.experts is not None:
            return "experts stand beside its MLP"
        if any(self.hooks[-2:]):
            return "torch has a hook for every module"
        for name, module, kind in _named(parts):
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{name} has a hook"
            if "forward" in module.__dict__:
                return f"{name} has a forward method of its own"
            known = weight_of(module) is not None if kind is nn.Linear else type(module) is kind
            if not known:
                return f"{name} is a {type(module).__module__}.{type(module).__qualname__}"
        if isinstance(parts.act_fn, nn.Module):
            return "its activation is a module"
        elsewhere = {str(t.device) for h in self.holders for t in h.values() if t is not None} - {str(self.device)}
        return f"its weights are on {', '.join(sorted(elsewhere))}, not on {self.device}" if elsewhere else ""

    def _form(self, x: Tensor) -> FusedLayer | str:
        fuse = fused_layers.get(x.device.type)
        return f"there are none for {x.device.type}" if fuse is None else fuse(self.parts, x)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or stored layer looks for itself


def _named(parts: LayerParts) -> list[tuple[str, Any, type[nn.Module]]]:
    """The modules by their names, and of which type each must be; a projection of any that computes a plain product."""
    return [
        ("self_attn", parts.self_attn, GemmaAttention),
        ("mlp", parts.mlp, GemmaMLP),
        *((name, norm, GemmaRMSNorm) for name, norm in parts.norm_modules()),
        *((name, module, nn.Linear) for name, module in parts.projections()),
    ]


def layers_plan(layers: Iterable[Any]) -> Decision:
    """Which fused forms a decoding step of these layers takes, and why not others."""
    said = [(i, FusionDecision(layer).decision) for i, layer in enumerate(layers)]
    runs = [(decision, [i for i, _ in run]) for decision, run in groupby(said, key=lambda pair: pair[1])]
    if len(runs) == 1:
        return runs[0][0]
    return Decision("; ".join(f"layers {at[0]} to {at[-1]}: {decision}" for decision, at in runs))
