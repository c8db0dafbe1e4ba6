"""The pieces between attention and attention: RMSNorm, rotary tables, the scaled embedding, the gated MLP.

Axis letters: B batch, S positions, D hidden, F mlp, H head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemmakit.config import GemmaConfig
from gemmakit.family import FULL_ATTENTION, LayerSpec, Norms
from gemmakit.pytorch.kernels import linear
from gemmakit.pytorch.kernels.ids import Activation
from gemmakit.pytorch.kernels.reference import ACTIVATION_OF, ACTIVATIONS
from gemmakit.pytorch.kernels.training import fuses, gated, rms_norm


class GemmaRMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * (1 + weight), all in float32, cast last. Source: arXiv:1910.07467."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D); same shape and dtype out."""
        if fuses(x, self.weight):
            return rms_norm(x, self.weight, self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        # The weight multiplies before the cast: afterwards the half formats would round twice.
        return (y * (1.0 + self.weight.float())).type_as(x)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class Linear(nn.Linear):
    """A projection whose weight is filled by the model: by init_weights, or from a checkpoint, never twice."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class GemmaScaledEmbedding(nn.Embedding):
    """Token embedding times sqrt(D), the factor rounded to the weight's dtype (7B: 55.5 in bfloat16)."""

    def reset_parameters(self) -> None:
        pass  # the model fills it

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, S) ids -> (B, S, D)."""
        # A Python float would multiply unrounded; a 0-d tensor of the weight's dtype rounds as training did.
        scale = torch.full((), self.embedding_dim**0.5, dtype=self.weight.dtype, device=self.weight.device)
        return super().forward(input) * scale


def activation(act: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of a configuration's `hidden_act`."""
    return act if callable(act) else ACTIVATIONS[_NUMBERS[act]]


_NUMBERS = {
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_erf": Activation.GELU_ERF,
    "relu": Activation.RELU,
    "silu": Activation.SILU,
}


class GemmaMLP(nn.Module):
    """down(act(gate(x)) * up(x)). Source: arXiv:2002.05202."""

    def __init__(self, config: GemmaConfig, spec: LayerSpec):
        super().__init__()
        D, F_ = config.hidden_size, spec.intermediate_size
        self.gate_proj = Linear(D, F_, bias=False)
        self.up_proj = Linear(D, F_, bias=False)
        self.down_proj = Linear(F_, D, bias=False)
        self.act_fn = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, D), same out."""
        if fuses(x) and self.act_fn in ACTIVATION_OF:
            return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), ACTIVATION_OF[self.act_fn]))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LayerNorms(NamedTuple):
    """A decoder layer's norms, as `family.Norms` names them; None for no norm."""

    before_attention: Any
    after_attention: Any
    before_mlp: Any
    after_mlp: Any


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

    def projections(self) -> list[tuple[str, Any]]:
        """Each by its name."""
        return [(name, module) for name, module in zip(self._fields, self, strict=True) if name.endswith("_proj")]

    def norm_modules(self) -> list[tuple[str, Any]]:
        return [(name, norm) for name, norm in zip(self.norm_names, self.norms, strict=True) if name and norm]


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
        self.register_buffer("inv_freq", torch.empty(config.head_dim // 2), persistent=False)
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
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids: (B or 1, S) -> cos, sin: (B or 1, 1, S, H) in `dtype`, to broadcast over heads."""
        inv_freq, scaling = self.inv_freq, self.attention_scaling
        if self.config.rope(self.rope)["rope_type"] in ("dynamic", "longrope"):
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
    rope, H = config.rope(name), config.head_dim
    exponents = torch.arange(0, H, 2, dtype=torch.float32, device=device) / H
    compute = _FREQUENCIES[rope["rope_type"]]
    return compute(rope, exponents, H, config.max_position_embeddings, length)


def _default(rope: dict[str, Any], exponents: Tensor, *_: int) -> tuple[Tensor, float]:
    return 1.0 / rope["rope_theta"] ** exponents, 1.0


def _linear(rope: dict[str, Any], exponents: Tensor, *_: int) -> tuple[Tensor, float]:
    """Position interpolation. Source: arXiv:2306.15595."""
    return _default(rope, exponents)[0] / rope["factor"], 1.0


def _dynamic(rope: dict[str, Any], exponents: Tensor, H: int, limit: int, length: int) -> tuple[Tensor, float]:
    """NTK-aware scaling that grows with the context."""
    factor = rope["factor"]
    base = rope["rope_theta"] * (factor * max(length, limit) / limit - (factor - 1)) ** (H / (H - 2))
    return 1.0 / base**exponents, 1.0


def _yarn(rope: dict[str, Any], exponents: Tensor, H: int, limit: int, _: int) -> tuple[Tensor, float]:
    """Interpolate slow features, keep fast ones, ramp between. Source: arXiv:2309.00071."""
    trained = rope.get("original_max_position_embeddings") or limit
    factor = rope["factor"] or limit / trained
    theta = rope["rope_theta"]

    def feature(turns: float) -> float:  # the feature index that makes `turns` turns over the trained context
        return H * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature(rope.get("beta_fast") or 32), feature(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    index = torch.arange(H // 2, dtype=torch.float32, device=exponents.device)
    keep = 1 - ((index - low) / ((high if high != low else high + 0.001) - low)).clamp(0, 1)
    scale = theta**exponents
    inv_freq = 1.0 / (factor * scale) * (1 - keep) + 1.0 / scale * keep
    return inv_freq, _yarn_scaling(rope, factor)


def _yarn_scaling(rope: dict[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def temperature(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)


def _llama3(rope: dict[str, Any], exponents: Tensor, *_: int) -> tuple[Tensor, float]:
    """Divide long wavelengths by the factor, keep short ones, blend between. Source: arXiv:2407.21783."""
    inv_freq = _default(rope, exponents)[0]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    trained, factor = rope["original_max_position_embeddings"], rope["factor"]
    wavelength = 2 * math.pi / inv_freq
    blend = (trained / wavelength - low) / (high - low)
    smooth = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > trained / low, inv_freq / factor, inv_freq)
    between = ~(wavelength < trained / high) & ~(wavelength > trained / low)
    return torch.where(between, smooth, scaled), 1.0


def _longrope(rope: dict[str, Any], exponents: Tensor, H: int, limit: int, length: int) -> tuple[Tensor, float]:
    """One factor a feature, another set beyond the trained context. Source: arXiv:2402.13753."""
    trained = rope.get("original_max_position_embeddings") or limit
    factor = rope.get("factor") or limit / trained
    scaling = rope.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    factors = torch.tensor(
        rope["long_factor" if length > trained else "short_factor"], dtype=torch.float32, device=exponents.device
    )
    return 1.0 / (factors * rope["rope_theta"] ** exponents), scaling


_FREQUENCIES: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
