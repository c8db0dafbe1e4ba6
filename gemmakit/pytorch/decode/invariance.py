"""Whether a model gives a token the same bits whatever else runs in its pass, and why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from gemmakit.config import GemmaConfig
from gemmakit.pytorch.attention import GemmaAttention, native_obstacle
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.fused.weights import misfit, weight_of
from gemmakit.pytorch.kernels import Decision, cpu
from gemmakit.pytorch.layers import GemmaMLP, GemmaRMSNorm, GemmaRotaryEmbedding, GemmaScaledEmbedding
from gemmakit.pytorch.model import GemmaDecoderLayer, GemmaModel
from gemmakit.pytorch.quantize.modules import QuantizedEmbedding
from gemmakit.pytorch.row_adapters import RowAdaptedLinear
from gemmakit.rotary import FOLLOW_LENGTH

HELD, NOT_HELD = "each request's bits are its own", "bits may depend on what else runs"
ALIKE, NOT_ALIKE = "several tokens a pass give the bits of one", "bits may depend on how many tokens a pass has"
# The code that runs beside the projections; that of the head's owner, above this module, is told by its file.
_KNOWN = {
    cls.forward
    for cls in (GemmaModel, GemmaDecoderLayer, GemmaAttention, GemmaMLP, GemmaRMSNorm, GemmaRotaryEmbedding,
                GemmaScaledEmbedding, QuantizedEmbedding, RowAdaptedLinear, nn.ModuleList)
}  # fmt: skip
_HEADS = "gemmakit.pytorch.heads"


def invariance(model: CausalLM, asked: bool | None = None) -> Decision:
    """Whether `kernels.batch_invariant` holds for packed passes of this model as it now is. asked: False, not to."""
    why = "batch_invariant is False" if asked is False else _obstacle(model)
    return Decision(NOT_HELD, why) if why else Decision(HELD)


def steps_alike(model: CausalLM) -> Decision:
    """Whether `kernels.rows_alike` holds for passes over the newest tokens of a row, after a first pass of this model.

    Cheap: what was decided of each layer is asked, not its modules.
    """
    why = _outside(model)
    if not why:
        beside: list[tuple[str, Any]] = [("the model", model), *model.named_children(), *model.model.named_children()]
        layers = model.model.layers
        named = [(name, module) for name, module in beside if module is not layers]
        why = next((f"{name} {found}" for name, module in named if (found := _of(module, model.dtype))), "")
        why = why or next((found for layer in layers if (found := _of_layer(layer))), "")
    return Decision(NOT_ALIKE, why) if why else Decision(ALIKE)


def _of_layer(layer: Any) -> str:
    """What keeps a decoder layer that has run from a form whose rows are alike."""
    fusion = layer.__dict__.get("fusion")
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "a layer has a hook"
    if fusion is None or fusion.form is None:
        return f"a layer runs by its modules{'' if fusion is None else f': {fusion.decision.why}'}"
    why = native_obstacle(layer.self_attn)
    return f"a layer attends through torch: {why}" if why else ""


def _obstacle(model: CausalLM) -> str:
    """Empty where there is none."""
    if why := _outside(model):
        return why
    return next((f"{name} {why}" for name, module in model.named_modules() if (why := _of(module, model.dtype))), "")


def _outside(model: CausalLM) -> str:
    """What is against it that is no module's."""
    if model.device.type != "cpu":
        return f"the model is on {model.device}, and only the CPU's kernels hold it"
    if cpu.library() is None:
        return cpu.decision().why
    if model.dtype not in cpu.FORMATS:
        return f"there are no native kernels for {model.dtype}"
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return "torch has a hook for every module"
    return _table(model.config)


def _table(config: GemmaConfig) -> str:
    ropes = {config.layer(i).rope for i in range(config.num_hidden_layers)}
    types = {config.rope(rope)["rope_type"] for rope in ropes} & set(FOLLOW_LENGTH)
    return f"rotary positions of type {min(types)!r} follow the longest text of a pass" if types else ""


def _of(module: nn.Module, dtype: torch.dtype) -> str:
    """What keeps a module from it."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a hook"
    if own := {"forward", "attend"} & module.__dict__.keys():
        return f"has a method of its own, {min(own)}"
    if any(t.device.type != "cpu" for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
        return "is not on the CPU"
    if isinstance(module, GemmaAttention) and (why := native_obstacle(module)):
        return f"attends through torch: {why}"
    weight = weight_of(module) if isinstance(module, nn.Linear) else None
    if weight is not None:
        why = misfit(module, dtype) or ("" if cpu.reads(weight) else "in a form that the native kernels do not read")
        return why and f"is {why}"
    known = type(module).forward in _KNOWN or type(module).forward.__module__ == _HEADS
    return "" if known else f"is a {type(module).__module__}.{type(module).__qualname__}"
