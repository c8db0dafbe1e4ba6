"""The pieces between attention and attention: RMSNorm, rotary tables, the scaled embedding, projections, the gated MLP.

Axis letters: B batch, S positions, D hidden, F mlp, H head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemmakit.config import GemmaConfig

Initializer = Callable[..., jax.Array]


def embedding_init(std: float, pad: int | None) -> Initializer:
    """Normal(0, std) with zeros in the row of the padding token."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        table = jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)
        return table if pad is None or pad < 0 else table.at[pad].set(0.0)

    return init


class FlaxGemmaRMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * (1 + weight), all in float32, cast last. Source: arXiv:1910.07467.

    Fresh weights are zero, as in PyTorch: 1 + weight multiplies, so ones would double every norm.
    """

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., D); same shape and dtype out."""
        weight = self.param("weight", nn.initializers.zeros_init(), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        # The weight multiplies before the cast: afterwards the half formats would round twice.
        return (y * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)


class FlaxLinear(nn.Module):
    """A projection with a kernel (in, out), computed in `dtype` whatever its parameters are stored in.

    Where the collection "lora" has `a` (in, r) and `b` (r, out) for it, their product is added. Source:
    arXiv:2106.09685.
    """

    features: int
    std: float
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., in) -> (..., out)."""
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", n).astype(self.dtype) for n in ("a", "b"))
            y = y + (x @ a) @ b
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)
        return y


class FlaxGemmaScaledEmbedding(nn.Module):
    """Token embedding times sqrt(D), the factor rounded to the weight's dtype (7B: 55.5 in bfloat16)."""

    config: GemmaConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        init = embedding_init(c.initializer_range, c.pad_token_id)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.hidden_size))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: (B, S) -> (B, S, D)."""
        scale = jnp.asarray(self.config.hidden_size**0.5, self.embedding.dtype)
        return (jnp.take(self.embedding, ids, axis=0, mode="clip") * scale).astype(self.dtype)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """The tied head: hidden (B, S, D) -> logits (B, S, V), by the unscaled weights."""
        return hidden @ self.embedding.astype(self.dtype).T


def activation(act: str | Callable[[Any], Any]) -> Callable[[jax.Array], jax.Array]:
    return act if callable(act) else _ACTIVATIONS[act]


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class FlaxGemmaMLP(nn.Module):
    """down(act(gate(x)) * up(x)). Source: arXiv:2002.05202."""

    config: GemmaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, S, D), same out."""
        c = self.config
        gate = FlaxLinear(c.intermediate_size, c.initializer_range, dtype=self.dtype, name="gate_proj")(x)
        up = FlaxLinear(c.intermediate_size, c.initializer_range, dtype=self.dtype, name="up_proj")(x)
        down = FlaxLinear(c.hidden_size, c.initializer_range, dtype=self.dtype, name="down_proj")
        return down(activation(c.hidden_act)(gate) * up)


def rotary_tables(config: GemmaConfig, position_ids: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """position_ids: (B or 1, S) -> cos, sin: (B or 1, 1, S, H) in `dtype`, to broadcast over heads.

    Angles are float32 whatever the model's dtype. Types "dynamic" and "longrope" depend on the longest position of the
    call alone.
    """
    inv_freq, scaling = rope_frequencies(config, position_ids)
    angles = position_ids[:, None, :, None].astype(jnp.float32) * inv_freq
    angles = jnp.concatenate((angles, angles), axis=-1)
    return (jnp.cos(angles) * scaling).astype(dtype), (jnp.sin(angles) * scaling).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split layout: feature i turns with feature i + H/2. x: (B, heads, S, H)."""
    half = x.shape[-1] // 2
    return x * cos + jnp.concatenate((-x[..., half:], x[..., :half]), axis=-1) * sin


def rope_frequencies(config: GemmaConfig, position_ids: jax.Array) -> tuple[Any, float]:
    """Inverse frequencies (H/2,) float32 and the factor on cos and sin.

    A table of numpy where the settings alone decide; an array that depends on the positions for the two types whose
    table follows the length of the call.
    """
    rope, H = config.rope_parameters, config.head_dim
    exponents = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    compute = _FREQUENCIES[rope["rope_type"]]
    return compute(rope, exponents, H, config.max_position_embeddings, position_ids)


def _default(rope: dict[str, Any], exponents: np.ndarray, *_: Any) -> tuple[np.ndarray, float]:
    return np.float32(1.0) / np.float32(rope["rope_theta"]) ** exponents, 1.0


def _linear(rope: dict[str, Any], exponents: np.ndarray, *_: Any) -> tuple[np.ndarray, float]:
    """Position interpolation. Source: arXiv:2306.15595."""
    return _default(rope, exponents)[0] / np.float32(rope["factor"]), 1.0


def _length(position_ids: jax.Array) -> jax.Array:
    return jnp.max(position_ids) + 1


def _dynamic(rope: dict[str, Any], exponents: np.ndarray, H: int, limit: int, at: jax.Array) -> tuple[jax.Array, float]:
    """NTK-aware scaling that grows with the context."""
    factor = rope["factor"]
    length = jnp.maximum(_length(at), limit).astype(jnp.float32)
    base = rope["rope_theta"] * (factor * length / limit - (factor - 1)) ** (H / (H - 2))
    return 1.0 / base**exponents, 1.0


def _yarn(rope: dict[str, Any], exponents: np.ndarray, H: int, limit: int, _: Any) -> tuple[np.ndarray, float]:
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
    width = np.float32((high if high != low else high + 0.001) - low)
    keep = 1 - np.clip((np.arange(H // 2, dtype=np.float32) - np.float32(low)) / width, 0, 1)
    scale = np.float32(theta) ** exponents
    one = np.float32(1.0)
    return one / (np.float32(factor) * scale) * (1 - keep) + one / scale * keep, _yarn_scaling(rope, factor)


def _yarn_scaling(rope: dict[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def temperature(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)


def _llama3(rope: dict[str, Any], exponents: np.ndarray, *_: Any) -> tuple[np.ndarray, float]:
    """Divide long wavelengths by the factor, keep short ones, blend between. Source: arXiv:2407.21783."""
    inv_freq = _default(rope, exponents)[0]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    trained, factor = rope["original_max_position_embeddings"], np.float32(rope["factor"])
    wavelength = np.float32(2 * math.pi) / inv_freq
    blend = (np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low)
    smooth = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = np.where(wavelength > trained / low, inv_freq / factor, inv_freq)
    between = ~(wavelength < trained / high) & ~(wavelength > trained / low)
    return np.where(between, smooth, scaled).astype(np.float32), 1.0


def _longrope(
    rope: dict[str, Any], exponents: np.ndarray, H: int, limit: int, at: jax.Array
) -> tuple[jax.Array, float]:
    """One factor a feature, another set beyond the trained context. Source: arXiv:2402.13753."""
    trained = rope.get("original_max_position_embeddings") or limit
    factor = rope.get("factor") or limit / trained
    scaling = rope.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    scale = np.float32(rope["rope_theta"]) ** exponents
    short, long = (1.0 / (np.asarray(rope[f"{n}_factor"], np.float32) * scale) for n in ("short", "long"))
    return jnp.where(_length(at) > trained, long, short), scaling


_FREQUENCIES: dict[str, Callable[..., tuple[Any, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
