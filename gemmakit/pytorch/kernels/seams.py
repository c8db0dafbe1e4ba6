"""The seams of a decoder layer: where a fused kernel stands in for several modules of a decoding step.

`choose` gives the implementation that may run a layer, or None: then the layer calls its modules one by one, which is
the reference, differentiable, and what hooks and adapters see. Axis letters: B batch, S positions (few), D hidden,
F mlp, N heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from gemmakit.pytorch.kernels.packed import PackedWeight


class Seams(Protocol):
    """One device's fused forms. Each rounds where the modules round: after the norm, each projection, each residual."""

    name: str
    any_rows: bool  # whether it takes more than MAX_ROWS

    def norm_qkv(
        self, x: Tensor, norm: nn.Module, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, S, D) -> (B, S, N * H), (B, S, K * H), (B, S, K * H)."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: tuple[Tensor, Tensor],
        visible: Any,
        cache: Any,
        cache_position: Tensor | None,
        attention: nn.Module,
    ) -> Tensor:
        """Rotate q and k, append k and v to the cache, attend: (B, S, N * H). `attention` is the GemmaAttention."""
        ...

    def project_add(self, x: Tensor, projection: nn.Module, residual: Tensor) -> Tensor:
        """residual + projection(x): (B, S, D)."""
        ...

    def norm_gate_up(
        self, x: Tensor, norm: nn.Module, gate: nn.Module, up: nn.Module, act: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """act(gate(norm(x))) * up(norm(x)): (B, S, F)."""
        ...


# By device type, the module whose `fused(layer, x)` gives the Seams for a layer of plain modules, all of whose tensors
# are on x's device, or says in words why there are none. What it gives is used for as long as the layer's modules and
# the addresses, dtypes and sizes of their tensors stay what they are: so it may keep pointers, never values.
FORMS = {"cpu": "gemmakit.pytorch.kernels.cpu.seams", "cuda": "gemmakit.pytorch.kernels.triton.seams"}
# A step of more rows (B * S) is matrix work, which the modules do best, but for forms that say otherwise.
MAX_ROWS = 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def choose(layer: nn.Module, x: Tensor, visible: Any, cache: Any, output_attentions: bool) -> Seams | None:
    """The fused forms that may run this layer on x (B, S, D), or None.

    Asked once a layer and call, so it costs a few microseconds: what changes between calls is looked at, and the rest
    is looked at again only when a module, a hook or the place of a tensor has changed.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or output_attentions or type(x) is not Tensor:
        return None
    B, S, _ = x.shape
    if not B * S or not (x.is_cpu or x.is_cuda) or _watched(x):
        return None
    chosen: Chosen | None = layer.__dict__.get("chosen")
    if chosen is None or not chosen.still(layer, x):
        chosen = layer.__dict__["chosen"] = Chosen(layer, x)
    if chosen.dropout and layer.training:
        return None
    if B * S > MAX_ROWS and chosen.seams is not None and not chosen.seams.any_rows:
        return None
    return chosen.seams


def _watched(x: Tensor) -> bool:
    """Whether somebody follows torch's own operations, which a fused form does not call: tracing, vmap, modes."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._is_tracing()
        or torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")
    )


class Chosen:
    """What was decided for one layer, and by which facts."""

    def __init__(self, layer: nn.Module, x: Tensor | None = None):
        self.modules = _modules(layer)
        there = [m for m in self.modules if m is not None]
        self.owns = [m.__dict__ for m in there]
        # The dictionaries themselves: one that fills later is seen.
        self.hooks = [d for m in there for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self.hooked, self.replaced = any(self.hooks), self._replaced()
        self.holders = [d for m in there for d in (m._parameters, m._buffers) if d]
        self.tensors = self._tensors()
        self.dropout = getattr(layer.get_submodule("self_attn"), "attention_dropout", 0.0) > 0
        if x is None:
            weight = getattr(layer.get_submodule("input_layernorm"), "weight", None)
            x = torch.empty((1, 1, 0), dtype=getattr(weight, "dtype", None), device=getattr(weight, "device", None))
        self.dtype, self.device = x.dtype, x.device
        found = self._obstacle(layer) or _forms(layer, x)
        self.seams, self.why = (None, found) if isinstance(found, str) else (found, "")

    def still(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether all that was looked at is as it was."""
        if any(self.hooks) != self.hooked or _modules(layer) != self.modules:
            return False
        if x.dtype != self.dtype or x.device != self.device:
            return False
        return self._replaced() == self.replaced and self._tensors() == self.tensors

    def _replaced(self) -> bool:
        """Whether a module has a forward of its own, as offloading gives it one."""
        for own in self.owns:  # noqa: SIM110  any() with a generator takes three times as long
            if "forward" in own:
                return True
        return False

    def _tensors(self) -> list[tuple[int, torch.dtype, int] | None]:
        """Where each tensor of the modules is; nothing for those that are no memory of this process."""
        return [
            (t.data_ptr(), t.dtype, t.numel()) if type(t) in _DENSE else None
            for holder in self.holders
            for t in holder.values()
            if t is not None
        ]

    def _obstacle(self, layer: nn.Module) -> str:
        """Why the modules must be called themselves; empty when a fused form computes the same."""
        from gemmakit.pytorch.layers import GemmaMLP, GemmaRMSNorm  # they stand above this module
        from gemmakit.pytorch.model import GemmaAttention

        if any(self.hooks[-2:]):
            return "torch has a hook for every module"
        named = [(name, m) for name, m in layer.named_modules() if m is not layer]
        kinds = {"self_attn": GemmaAttention, "mlp": GemmaMLP}
        for name, module in named:
            last = name.rpartition(".")[2]
            kind = GemmaRMSNorm if last.endswith("layernorm") else kinds.get(last)
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{last} has a hook"
            if "forward" in module.__dict__:
                return f"{last} has a forward method of its own"
            known = type(module) is kind if kind else last in PROJECTIONS and weight_of(module) is not None
            if not known:
                return f"{last} is a {type(module).__module__}.{type(module).__qualname__}"
        if len(named) != len(PROJECTIONS) + 4:
            return f"it has {len(named)} modules where {len(PROJECTIONS) + 4} are known"
        elsewhere = {str(t.device) for h in self.holders for t in h.values() if t is not None} - {str(self.device)}
        return f"its weights are on {', '.join(sorted(elsewhere))}, not on {self.device}" if elsewhere else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or stored layer looks for itself


_DENSE = (Tensor, nn.Parameter)


def _modules(layer: nn.Module) -> list[nn.Module | None]:
    """The modules of a layer in a fixed order, its attention first; what has become of them is not looked at."""
    own = layer._modules
    attention, mlp = own["self_attn"], own["mlp"]
    assert attention is not None and mlp is not None
    return [*own.values(), *attention._modules.values(), *mlp._modules.values()]


def _forms(layer: nn.Module, x: Tensor) -> Seams | str:
    if x.device.type not in FORMS:
        return f"there are none for {x.device.type}"
    try:
        forms = importlib.import_module(FORMS[x.device.type])
    except ImportError as error:
        return f"they do not load: {error}"
    return forms.fused(layer, x)


def weight_of(module: nn.Module) -> Tensor | PackedWeight | None:
    """The weight (O, I) behind a projection that computes x @ weight.T + bias and nothing else; None for any other.

    None means that the module must be called: an adapter, bitsandbytes, a subclass, hooks, a forward of its own.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    if type(module) in _plain():
        weight = module._parameters.get("weight")
        return weight if type(weight) in _DENSE else None
    packed = getattr(module, "packed", None) if type(module).__module__.startswith("gemmakit.") else None
    return packed if isinstance(packed, PackedWeight) else None


@functools.cache
def _plain() -> tuple[type[nn.Module], ...]:
    from gemmakit.pytorch.layers import Linear  # it stands above this module

    return nn.Linear, Linear


def seams_plan(layers: Iterable[nn.Module]) -> str:
    """Which fused forms a decoding step of these layers takes, or why not, in words."""
    said: list[tuple[int, str]] = []
    for i, layer in enumerate(layers):
        chosen = Chosen(layer)
        if chosen.seams is None:
            said.append((i, f"modules ({chosen.why})"))
        else:
            words = getattr(chosen.seams, "plan", chosen.seams.name)
            beyond = getattr(chosen.seams, "beyond", "")
            said.append((i, f"{words}, without gradients, up to {MAX_ROWS} rows{beyond}"))
    runs = [(words, [i for i, _ in run]) for words, run in groupby(said, key=lambda pair: pair[1])]
    if len(runs) == 1:
        return runs[0][0]
    return "; ".join(f"layers {at[0]} to {at[-1]}: {words}" for words, at in runs)
