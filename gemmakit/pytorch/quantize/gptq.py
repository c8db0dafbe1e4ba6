"""GPTQ: codes that keep a layer's outputs on a text, rather than each weight by itself. Source: arXiv:2210.17323.

The columns of a weight are rounded one after the other, those whose inputs are largest first, and what a column loses
is made up for by the columns still to come, as the second derivatives of the layer's squared error say. Scales are
chosen before (so the layout is the ordinary one), the error at each input counted by that input's size.

Memory: the hidden states of the texts, R * S * D * 4 bytes, and what layers keep for others or read beside them; one
layer in float32; three matrices of I * I * 4 bytes for the widest projection (2B: 1 GB each). Axis letters: R texts,
S positions, O outputs, I inputs, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, NumericalError
from gemmakit.pytorch import per_layer
from gemmakit.pytorch.kernels import PackedWeight
from gemmakit.pytorch.kernels.packed import code_range, pack
from gemmakit.pytorch.quantize import rounding
from gemmakit.pytorch.quantize.modules import QuantizedLinear
from gemmakit.pytorch.quantize.own import WeightOnlyQuantizer

# Added to the diagonal, as a share of its mean: keeps the inverse tame where inputs hardly vary.
DAMPING = 0.01
# Columns whose updates reach the rest of the weight together, in one product.
BLOCK = 128
# Rows of a weight at a time: they do not depend on each other, and a vocabulary has many.
ROWS = 16384
# Of a head that is the embedding too: what the error of a looked-up number counts beside that of a logit.
LOOKED_UP = 1.0
# Projections that read the same input; each sees the ones before it already quantized.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
    ("per_layer_input_gate",),
    ("per_layer_projection",),
)
_TEXTS = 8  # run together


@torch.no_grad()
def calibrate(
    model: Any, ids: Tensor, quantizer: WeightOnlyQuantizer, report: Callable[[str], None] = lambda name: None
) -> None:
    """Quantize the projections of the decoder layers in place; embedding, head and norms stay as they are
    (`head_weight`).

    Args:
        model: a GemmaForCausalLM or another model of the family, with plain weights of any float dtype, on one device.
        ids: (R, S) token ids.
        quantizer: which projections, and their layout.
        report: called with the name of each layer that is done.

    Raises:
        InputError: ids of another shape.
        NumericalError: activations that are not finite.
    """
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        raise InputError(f"calibration_ids is {ids.dtype} of shape {tuple(ids.shape)}; it must be ids of shape (R, S).")
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    told = _calls(base, ids.to(model.device))
    hidden = [call.hidden for call in told[0]]
    for i, (layer, calls) in enumerate(zip(base.layers, told, strict=True)):
        for call, entering in zip(calls, hidden, strict=True):
            call.hidden = entering
        name = f"{prefix}layers.{i}"
        with _in_float(layer):
            for stage in STAGES:
                _quantize_stage(layer, stage, name, calls, quantizer)
            hidden = [call.run(layer) for call in calls]
        report(name)


@torch.no_grad()
def head_weight(model: Any, ids: Tensor, layout: tuple[int, int | None]) -> PackedWeight:
    """The weight of a plain model's head, rounded to `layout`: by the logits, and where it is the embedding, by itself.

    Args:
        model: a GemmaForCausalLM; its layers are best still plain. ids: (R, S) token ids.

    Raises:
        NumericalError: hidden states that are not finite.
    """
    weight = model.get_output_embeddings().weight
    hessian = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    for piece in ids.to(weight.device).split(_TEXTS):
        x = model.base_model(input_ids=piece, use_cache=False).last_hidden_state.flatten(0, 1).float()
        if not torch.isfinite(x).all():
            raise NumericalError("the hidden states of the calibration text are not finite: the weights are damaged.")
        hessian.addmm_(x.T, x)
    if model.config.tie_word_embeddings:
        hessian.diagonal().add_(LOOKED_UP * hessian.diagonal().mean())
    return gptq(weight, hessian, *layout, name="the head's weight")


@contextmanager
def _in_float(module: nn.Module) -> Generator[None]:
    """Plain numbers in float32 meanwhile, and back in their dtypes afterwards."""

    def tensors() -> dict[str, Tensor]:
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}

    dtypes = {name: tensor.dtype for name, tensor in tensors().items()}
    module.float()
    try:
        yield
    finally:
        for name, tensor in tensors().items():
            if name in dtypes and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtypes[name])


def memory_bytes(config: GemmaConfig, ids: Tensor, bits: int) -> int:
    """What `calibrate` takes at most beside a model mapped from its file."""
    D, F, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    widest, layer = max(D, F, heads), 3 * D * F + 4 * D * heads
    weights = (config.num_hidden_layers * layer + config.vocab_size * D) * (bits + 1) // 8
    texts = ids.numel() * D + _TEXTS * ids.shape[-1] * (3 * F + 4 * D)
    specs = [config.layer(i) for i in range(config.num_hidden_layers)]
    read = [config.layer(i) for i in {spec.kv_source for spec in specs} if i is not None]
    texts += ids.numel() * (sum(2 * s.num_key_value_heads * s.head_dim for s in read))
    texts += ids.numel() * config.num_hidden_layers * (config.hidden_size_per_layer_input or 0)
    return 4 * (texts + layer + 3 * widest**2 + 4 * D * max(F, min(config.vocab_size, ROWS))) + weights


class _Call:
    """The arguments with which some texts enter a layer."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.hidden: Tensor = args[0]
        self.args, self.kwargs = args[1:], kwargs

    def run(self, layer: nn.Module) -> Tensor:
        out = layer(self.hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


class _Stop(Exception):
    pass


def _calls(base: Any, ids: Tensor) -> list[list[_Call]]:
    """What each layer is called with: its own window, rotary table and embedding, and where keys are left for others.

    No layer runs. Hidden states are the first's, in float32.
    """
    told: list[list[_Call]] = [[] for _ in base.layers]

    def keep(i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            told[i].append(_Call(args, kwargs))
            if i + 1 == len(told):
                raise _Stop
            return args[0], None

        return forward

    for i, layer in enumerate(base.layers):
        layer.forward = keep(i)
    try:
        for piece in ids.split(_TEXTS):
            told_more = {}
            if base.config.hidden_size_per_layer_input:
                told_more = {"per_layer_inputs": per_layer.token_inputs(base, piece).float()}
            with suppress(_Stop), _in_float(nn.ModuleDict(per_layer.projections(base))):
                base(inputs_embeds=base.embed_tokens(piece).float(), use_cache=False, **told_more)
    finally:
        for layer in base.layers:
            del layer.forward
    return told


def _quantize_stage(
    layer: nn.Module, stage: tuple[str, ...], prefix: str, calls: list[_Call], quantizer: WeightOnlyQuantizer
) -> None:
    held = dict(layer.named_modules())
    layouts = {name: quantizer.layout(f"{prefix}.{name}") for name in stage if name in held}
    if not any(layouts.values()):
        return
    hessian = _hessian(layer, next(iter(layouts)), calls)
    for name, layout in layouts.items():
        if layout is not None:
            module: Any = layer.get_submodule(name)
            packed = gptq(module.weight, hessian, *layout, name=f"{prefix}.{name}.weight")
            layer.set_submodule(name, QuantizedLinear(packed, module.bias))


def _hessian(layer: nn.Module, name: str, calls: list[_Call]) -> Tensor:
    """The sum over all tokens of x^T x, (I, I), of the inputs x of a projection."""
    total: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        if not torch.isfinite(x).all():
            raise NumericalError(f"the input of {name} is not finite on the calibration text: the weights are damaged.")
        if not total:
            total.append(x.new_zeros(x.shape[1], x.shape[1]))
        total[0].addmm_(x.T, x)
        raise _Stop  # what follows in the layer is of no interest

    handle = layer.get_submodule(name).register_forward_pre_hook(add)
    try:
        for call in calls:
            with suppress(_Stop):
                call.run(layer)
    finally:
        handle.remove()
    return total[0]


def gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int | None, *, name: str = "the weight"
) -> PackedWeight:
    """Round a weight (O, I) given the second derivatives (I, I) of the error in its outputs, up to a factor."""
    out = rounding.empty(weight.shape[0], weight.shape[1], bits, group_size, weight.device)
    order = hessian.diagonal().argsort(descending=True)
    factor = _factor(hessian, order)
    group = torch.arange(out.in_features, device=weight.device) // out.group_size
    for begin in range(0, len(weight), ROWS):
        rows = slice(begin, begin + ROWS)
        piece = weight[rows].detach().float()
        packed = rounding.quantize(piece, bits, group_size, name=name, importance=hessian.diagonal())
        # Inputs in rows: each is then one piece of memory.
        scale = packed.scale.float().T[group[order]]
        zero = None if packed.zero is None else packed.zero.float().T[group[order]]
        codes = _round_inputs(piece.T[order], factor, bits, scale, zero)
        chosen = packed._replace(codes=pack(codes[order.argsort()].T.contiguous(), bits))
        for whole, part in zip(out.tensors, chosen.tensors, strict=True):
            whole[rows] = part
    return out


def _factor(hessian: Tensor, order: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse, inputs in `order`."""
    hessian = hessian[order][:, order]
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _round_inputs(weight: Tensor, factor: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    """weight: (I, O), overwritten; scale, zero: (I, O), of each weight -> codes (I, O), float32."""
    I = len(weight)
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    low, high = code_range(bits)
    for begin in range(0, I, BLOCK):
        end = min(begin + BLOCK, I)
        for i in range(begin, end):
            offset = 0.0 if zero is None else zero[i]
            torch.div(weight[i], scale[i], out=codes[i]).round_().add_(offset).clamp_(low, high)
            lost = weight[i] - (codes[i] - offset) * scale[i]
            errors[i] = lost.div_(factor[i, i])
            weight[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i], alpha=-1)
        weight[end:].addmm_(factor[begin:end, end:].T, errors[begin:end], alpha=-1)
    return codes
