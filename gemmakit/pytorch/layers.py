"""The pieces between attention and attention: RMSNorm, rotary tables, the scaled embedding, the gated MLP.

Axis letters: B batch, S positions, D hidden, F mlp, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.family import FULL_ATTENTION, Norms
from gemmakit.layer_spec import LayerSpec
from gemmakit.native.ids import Activation
from gemmakit.pytorch.kernels import are_rows_alike, linear, one_by_one
from gemmakit.pytorch.kernels.reference import ACTIVATION_OF, ACTIVATIONS
from gemmakit.pytorch.kernels.training import fuses, gated, rms_norm
from gemmakit.pytorch.shapes import Float, Int
from gemmakit.rotary import FOLLOW_LENGTH, Arrays, frequencies

# In float16 the residual stream of models that norm all that enters it would pass the largest number (65,504), so it
# carries this part of itself. A power of two changes no digit: in float32 every result would be the same to the bit.
STREAM_SCALES = {torch.float16: 2.0**-7}


class GemmaRMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * (offset + weight), all in float32, cast last. Source: arXiv:1910.07467.

    weighted: whether there is a weight; without one nothing is multiplied. reads_stream, writes_stream: whether what
    comes in, or what goes out, is a residual stream that `STREAM_SCALES` scales in some dtypes.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        offset: float = 1.0,
        weighted: bool = True,
        reads_stream: bool = False,
        writes_stream: bool = False,
    ):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.reads_stream, self.writes_stream = reads_stream, writes_stream
        self.weight: nn.Parameter | None
        self.register_parameter("weight", nn.Parameter(torch.full((dim,), 1.0 - offset)) if weighted else None)

    def eps_of(self, dtype: torch.dtype) -> float:
        """What is added to the mean square of activations of `dtype`."""
        return self.eps * STREAM_SCALES.get(dtype, 1.0) ** 2 if self.reads_stream else self.eps

    def gain_of(self, dtype: torch.dtype) -> float:
        """What the result is multiplied by before it is cast to `dtype`."""
        return STREAM_SCALES.get(dtype, 1.0) if self.writes_stream else 1.0

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """In x's dtype."""
        eps, gain = self.eps_of(x.dtype), self.gain_of(x.dtype)
        weight = self.weight
        if weight is not None and gain == 1.0 and self.offset == 1.0 and fuses(x, weight):
            return rms_norm(x, weight, eps)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
        if weight is not None:  # before the cast: afterwards the half formats would round twice
            y = y * (self.offset + weight.float())
        return (y if gain == 1.0 else y * gain).type_as(x)

    def extra_repr(self) -> str:
        return f"{'no weight' if self.weight is None else tuple(self.weight.shape)}, eps={self.eps}"


class Linear(nn.Linear):
    """A projection whose weight is filled by the model: by init_weights, or from a checkpoint, never twice."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        return linear(input, self.weight, self.bias)


class GemmaScaledEmbedding(nn.Embedding):
    """Token embedding times sqrt(D), the factor rounded to the weight's dtype (7B: 55.5 in bfloat16).

    scaled_by: the D of the factor; None for the width of a row.
    """

    def __init__(self, rows: int, width: int, padding_idx: int | None = None, *, scaled_by: int | None = None):
        super().__init__(rows, width, padding_idx)
        self.scaled_by = scaled_by or width

    def reset_parameters(self) -> None:
        pass  # the model fills it

    @property
    def embed_scale(self) -> Float[Tensor, ""]:
        """What rows are multiplied by; the name that peft asks for."""
        # A Python float would multiply unrounded; a 0-d tensor of the weight's dtype rounds as training did.
        return torch.full((), self.scaled_by**0.5, dtype=self.weight.dtype, device=self.weight.device)

    def forward(self, input: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
        return super().forward(input) * self.embed_scale


def activation(act: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of a configuration's `hidden_act`."""
    return act if callable(act) else ACTIVATIONS[_NUMBERS[act]]


_NUMBERS = {
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_erf": Activation.GELU_ERF,
    "relu": Activation.RELU,
    "silu": Activation.SILU,
}


def activated(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """act(x); under `batch_invariant` and `rows_alike` each row as if it stood alone."""
    return one_by_one(act, x) if are_rows_alike() else act(x)


class GemmaMLP(nn.Module):
    """down(act(gate(x)) * up(x)). Source: arXiv:2002.05202."""

    def __init__(self, config: GemmaConfig, spec: LayerSpec):
        super().__init__()
        D, F_ = config.hidden_size, spec.intermediate_size
        self.gate_proj = Linear(D, F_, bias=False)
        self.up_proj = Linear(D, F_, bias=False)
        self.down_proj = Linear(F_, D, bias=False)
        self.act_fn = activation(config.hidden_act)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        if fuses(x) and self.act_fn in ACTIVATION_OF:
            return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), ACTIVATION_OF[self.act_fn]))
        return self.down_proj(activated(self.act_fn, self.gate_proj(x)) * self.up_proj(x))


class LayerNorms(NamedTuple):
    """A decoder layer's norms, as `family.Norms` names them; None for no norm."""

    before_attention: Any
    after_attention: Any
    before_mlp: Any
    after_mlp: Any


def layer_norms(config: GemmaConfig) -> dict[str, GemmaRMSNorm]:
    """Fresh norms of a decoder layer, by name."""
    kind, made = config.kind, {}
    for slot, name in kind.norms._asdict().items():
        if name is not None:
            writes = slot in ("after_attention", "after_mlp")
            made[name] = GemmaRMSNorm(
                config.hidden_size,
                config.rms_norm_eps,
                offset=kind.norm_offset,
                reads_stream=kind.norms_outputs and not writes,
                writes_stream=kind.norms_outputs and writes,
            )
    return made


def through(norm: nn.Module | None, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
    return x if norm is None else norm(x)


class LayerParts(NamedTuple):
    """What a decoder layer is made of: declared by the layer, for those who run it otherwise than by its modules."""

    self_attn: Any
    mlp: Any
    norms: LayerNorms
    norm_names: Norms
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Callable[[Tensor], Tensor]
    per_layer_input_gate: Any = None
    per_layer_projection: Any = None
    post_per_layer_input_norm: Any = None
    experts: Any = None  # beside the MLP

    def projections(self) -> list[tuple[str, Any]]:
        """Each by its name, of those that the layer has."""
        named = zip(self._fields, self, strict=True)
        ends = ("_proj", "_gate", "_projection")
        return [(name, module) for name, module in named if name.endswith(ends) and module is not None]

    def norm_modules(self) -> list[tuple[str, Any]]:
        """Each by its name: the layer's, then those of heads, then that of its own embedding."""
        own = list(zip(self.norm_names, self.norms, strict=True))
        own += [(name, self.self_attn._modules.get(name)) for name in ("q_norm", "k_norm", "v_norm")]
        own += [("post_per_layer_input_norm", self.post_per_layer_input_norm)]
        return [(name, norm) for name, norm in own if name and norm is not None]


# Cosine and sine of each position; with 1 for B they are every row's.
RotaryTables = tuple[Float[Tensor, "#B 1 S H"], Float[Tensor, "#B 1 S H"]]


class GemmaRotaryEmbedding(nn.Module):
    """Cosine and sine tables for the positions at hand.

    The inverse frequencies stay float32 whatever the model is cast to: in bfloat16 position 8191 would be off by
    whole turns. Types "dynamic" and "longrope" depend on the longest position of the call alone, never on what an
    earlier call saw.
    """

    def __init__(self, config: GemmaConfig, rope: str = FULL_ATTENTION):
        """rope: which table, as a LayerSpec names it."""
        super().__init__()
        self.config = config
        self.rope = rope
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.empty(config.rotary_dim(rope) // 2), persistent=False)
        self.attention_scaling = 1.0
        self.reset_parameters()

    def reset_parameters(self, device: torch.device | None = None) -> None:
        """Recompute the table on `device` (default: where it is)."""
        device = self.inv_freq.device if device is None else device
        if device.type != "meta":
            self.inv_freq, self.attention_scaling = rope_frequencies(self.config, 0, device, self.rope)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GemmaRotaryEmbedding:
        super()._apply(fn, recurse)  # type: ignore[arg-type]
        self.reset_parameters()  # undoes a cast and fills a buffer that came from meta
        return self

    @torch.no_grad()
    def forward(self, position_ids: Int[Tensor, "B S"], dtype: torch.dtype) -> RotaryTables:
        """In `dtype`, to broadcast over heads; B is 1 where all rows have the same positions."""
        inv_freq, scaling = self.inv_freq, self.attention_scaling
        if self.config.rope(self.rope)["rope_type"] in FOLLOW_LENGTH:
            length = int(position_ids.max()) + 1 if position_ids.numel() else 1
            inv_freq, scaling = rope_frequencies(self.config, length, inv_freq.device, self.rope)
        angles = position_ids[:, None, :, None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if scaling != 1.0:
            cos, sin = cos * scaling, sin * scaling
        return cos.to(dtype), sin.to(dtype)


def rope_frequencies(
    config: GemmaConfig, length: int = 0, device: torch.device | None = None, name: str = FULL_ATTENTION
) -> tuple[Tensor, float]:
    """Inverse frequencies (H/2,) float32 and the factor on cos and sin, for a context of `length` tokens.

    name: which table, as a LayerSpec names it.
    """

    def where(truth: Tensor | bool, yes: Any, no: Any) -> Any:
        return torch.where(truth, yes, no) if isinstance(truth, Tensor) else yes if truth else no

    float32: Any = {"dtype": torch.float32, "device": device}
    arrays = Arrays(lambda n: torch.arange(n, **float32), lambda numbers: torch.tensor(numbers, **float32), where)
    return frequencies(config.rope(name), config.rotary_dim(name), config.max_position_embeddings, length, arrays)
