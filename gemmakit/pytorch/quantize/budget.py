"""Which weights get 4 bits and which up to 8, when the model may have so many bytes: where an error costs most.

What a format costs a module is estimated in one of two ways. Without a text by the weight's squared error relative to
its own size, times a power of the number of its weights. With one by what the error does to the model's predictions,
to second order: for a projection y = W x the divergence from the exact model's predictions is half the mean of
(g^T dW x)^2 over the text's tokens, g the gradient of -log p of a token that is drawn from the predictions themselves
(the Fisher information). Errors of rounding are taken for independent of each other, so that only squares count, and
the sum of g_o^2 x_i^2 over tokens is kept by its rows' and columns' sums.

Then the formats are those of the least error in all, as far as an estimate knows, within the bytes (a knapsack).

Axis letters: R texts, S positions, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, NumericalError
from gemmakit.pytorch.kernels.packed import dequantize
from gemmakit.pytorch.quantize import rounding
from gemmakit.quantization import FORMATS

CHEAPEST = next(iter(FORMATS))
# Rows of a weight that its relative error is taken from, evenly spread.
ROWS = 1024
# Of the number of weights: 4-bit projections cost the 270M that Google trained three times what its 4-bit embedding
# does, which has 210 times the weights of one of the 126. With 0 it would get the fewest bits, with 1 all get as many.
POWER = 0.7
# Tokens of a text that are run at once, and how many in all: gradients of a vocabulary's logits are large.
WIDTH, TOKENS = 256, 2048
STEPS = 50_000  # that the room above the cheapest formats is counted in


class Cost(NamedTuple):
    """What one format costs a module."""

    bytes: int
    error: float


Costs = dict[str, Cost]  # by format


class Effect(NamedTuple):
    """How much a squared error of a weight matters, as the product of (O,) and (I,)."""

    outputs: Tensor
    inputs: Tensor


# -- what a format costs -----------------------------------------------------------------------------------------------


def costs(weight: Tensor, effects: Iterable[Effect] | None = None, name: str = "the weight") -> Costs:
    """Of every format, for a weight (O, I) of any float dtype: by the effects, or relative to its own size."""
    O, I = weight.shape
    if effects is None:
        rows = torch.linspace(0, O - 1, min(O, ROWS), device=weight.device).long()
        piece = weight[rows].detach().float()
        size = float(piece.square().sum()) or 1.0
        counts = (O * I) ** POWER / size
        errors = {kind: float(_rounded(piece, kind, name).sub_(piece).square_().sum()) * counts for kind in FORMATS}
    else:
        errors = dict.fromkeys(FORMATS, 0.0)
        step = max(1, rounding.CHUNK * 4 // I)
        held = list(effects)
        for begin in range(0, O, step):
            piece = weight[begin : begin + step].detach().float()
            for kind in FORMATS:
                lost = _rounded(piece, kind, name).sub_(piece).square_()
                errors[kind] += sum(float(e.outputs[begin : begin + step] @ (lost @ e.inputs)) for e in held)
    sizes = {kind: rounding.empty(O, I, *layout, device="meta").nbytes for kind, layout in FORMATS.items()}
    return {kind: Cost(size, errors[kind]) for kind, size in sizes.items()}


def _rounded(weight: Tensor, kind: str, name: str) -> Tensor:
    return dequantize(rounding.quantize(weight, *FORMATS[kind], name=name))


def effects(model: Any, ids: Tensor, taken: Callable[[str], bool]) -> dict[str, list[Effect]]:
    """By module, of the projections and embeddings that are `taken`: how errors of their weights reach the predictions.

    A matrix that is the embedding and the head has two. The model's memory grows by what one backward pass over WIDTH
    tokens keeps.

    Args:
        model: a GemmaForCausalLM with plain weights.
        ids: (R, S) token ids, of which as many pieces as TOKENS allows are used, evenly spread.

    `memory_bytes` says what it takes.

    Raises:
        NumericalError: activations that are not finite.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding) and taken(name)}
    sums = {name: _Sums(module) for name, module in modules.items()}
    handles = [model.get_input_embeddings().register_forward_hook(_begin)]
    handles += [module.register_forward_hook(sums[name]) for name, module in modules.items()]
    trained = [p for p in model.parameters() if p.requires_grad]
    draw = torch.Generator(ids.device).manual_seed(0)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for piece in _pieces(ids):
            with torch.enable_grad():
                logits = model(input_ids=piece, use_cache=False).logits[0].float()
                if not torch.isfinite(logits).all():
                    raise NumericalError("the logits of the calibration text are not finite: the weights are damaged.")
                said = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
                F.cross_entropy(logits, said, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    ties = model.tied_weights if model.config.tie_word_embeddings else {}
    found = {name: [held.effect()] for name, held in sums.items()}
    for tied, source in ties.items():
        tied, source = tied.removesuffix(".weight"), source.removesuffix(".weight")
        if tied in found and source in found:
            found[source] += found.pop(tied)
    return found


def memory_bytes(config: GemmaConfig, ids: Tensor) -> int:
    """What `effects` takes at most beside the model: what one backward pass keeps of a piece, and the sums."""
    tokens = min(WIDTH, ids.shape[-1])
    specs = [config.layer(i) for i in range(config.num_hidden_layers)]
    # Of a layer: norms and sums of hidden states, q, k and v before and after they turn, scores, gate and up.
    kept = sum(
        12 * config.hidden_size
        + 4 * (s.num_attention_heads + 2 * s.num_key_value_heads) * s.head_dim
        + 3 * s.num_attention_heads * tokens
        + 5 * s.intermediate_size
        for s in specs
    )
    # Logits, their probabilities and their gradients; of a matrix of the vocabulary, its rows' sums.
    return 4 * (tokens * (kept + 6 * config.vocab_size) + 4 * config.vocab_size)


def _pieces(ids: Tensor) -> Iterable[Tensor]:
    pieces = [piece for row in ids for piece in row[None].split(WIDTH, dim=1)]
    count = max(1, min(len(pieces), TOKENS // min(WIDTH, ids.shape[1])))
    return (pieces[int(i)] for i in torch.linspace(0, len(pieces) - 1, count))


def _begin(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """A forward hook: gradients' path begins here, as no parameter takes any."""
    return out.detach().requires_grad_()


class _Sums:
    """A forward hook: of the matrix of sums over tokens of (gradient of an output)^2 (input)^2, its rows' and columns'
    sums, of which the product is the nearest matrix that two vectors give. An embedding's inputs are ones of its rows.

    Sizes of gradients and inputs apart would not do: the first token's inputs are large where nothing depends on them.
    """

    def __init__(self, module: Any):
        O, I = module.weight.shape
        self.rows, self.columns = (torch.zeros(n, device=module.weight.device) for n in (O, I))
        self.tokens = 0

    def __call__(self, module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].detach()
        self.tokens += out.shape[:-1].numel()
        if out.requires_grad:
            looked_up = isinstance(module, nn.Embedding)
            scale = float(getattr(module, "embed_scale", 1.0))
            out.register_hook(partial(self._look_up, x, scale) if looked_up else partial(self._product, x))

    def _product(self, x: Tensor, gradient: Tensor) -> None:
        x, gradient = (t.flatten(0, -2).float().square() for t in (x, gradient))
        self.rows += x.sum(1) @ gradient
        self.columns += gradient.sum(1) @ x

    def _look_up(self, ids: Tensor, scale: float, gradient: Tensor) -> None:
        gradient = (gradient.flatten(0, -2).float() * scale).square()
        self.rows.index_add_(0, ids.flatten(), gradient.sum(1))
        self.columns += gradient.sum(0)

    def effect(self) -> Effect:
        """For a mean over tokens; the half is that of the second order."""
        share = 0.5 / max(1, self.tokens) / float(self.rows.sum().clamp_min(1e-30))
        return Effect(self.rows, self.columns * share)


# -- which format each gets --------------------------------------------------------------------------------------------


def choose(found: Mapping[str, Costs], weights: int, bits: float) -> dict[str, str]:
    """Format by module: the least error of all that take at most `bits` a weight together, scales and zeros included.

    Bytes are counted in steps of a fifty-thousandth of the room, rounded up; what that leaves over goes to
    the module that gains most by it.

    Args:
        found: what each format costs each module.
        weights: how many there are in all of them.

    Raises:
        InputError: the cheapest formats take more.
    """
    least = sum(held[CHEAPEST].bytes for held in found.values())
    room = int(bits * weights / 8) - least
    if room < 0:
        least = 8 * least / max(weights, 1)
        raise InputError(f"bits is {bits}; this model's weights take at least {least:.3f} bits, scales included.")
    chosen = _knapsack(found, room)
    room -= sum(_more(found[name], kind) for name, kind in chosen.items())
    while True:
        wider = [
            (held[chosen[name]].error - held[kind].error, name, kind)
            for name, held in found.items()
            for kind in FORMATS
            if 0 < held[kind].bytes - held[chosen[name]].bytes <= room
        ]
        gain, name, kind = max(wider, default=(0.0, "", ""))
        if gain <= 0:
            return chosen
        room -= found[name][kind].bytes - found[name][chosen[name]].bytes
        chosen[name] = kind


def _more(held: Costs, kind: str) -> int:
    return held[kind].bytes - held[CHEAPEST].bytes


def _knapsack(found: Mapping[str, Costs], room: int) -> dict[str, str]:
    """One format a module, by the least error with every number of steps of room."""
    step = max(1, room // STEPS)
    best = np.zeros(room // step + 1)
    taken: list[np.ndarray] = []
    for held in found.values():
        totals = np.full((len(FORMATS), len(best)), np.inf)
        for i, kind in enumerate(FORMATS):
            need = -(-_more(held, kind) // step)
            if need < len(best):
                totals[i, need:] = best[: len(best) - need] + held[kind].error
        taken.append(totals.argmin(0).astype(np.int8))
        best = totals.min(0)
    at, chosen = len(best) - 1, {}
    for (name, held), formats in reversed(list(zip(found.items(), taken, strict=True))):
        chosen[name] = list(FORMATS)[formats[at]]
        at -= -(-_more(held, chosen[name]) // step)
    return {name: chosen[name] for name in found}


def module_formats(chosen: Mapping[str, str]) -> dict[str, list[str]]:
    """As `WeightOnlyConfig.module_formats`, by names that hold for every class of the family."""
    out: dict[str, list[str]] = {kind: [] for kind in FORMATS}
    for name, kind in chosen.items():
        out[kind].append(name.removeprefix("model."))
    return {kind: names for kind, names in out.items() if names}
