"""The pieces between attention and attention: RMSNorm, rotary tables, the scaled embedding, projections, the gated MLP.

Axis letters: B batch, S positions, D hidden, F mlp, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemmakit.config import GemmaConfig
from gemmakit.family import FULL_ATTENTION
from gemmakit.flax.products import product
from gemmakit.layer_spec import LayerSpec
from gemmakit.rotary import FOLLOW_LENGTH, Arrays, frequencies

Initializer = Callable[..., jax.Array]


def embedding_init(std: float, pad: int | None) -> Initializer:
    """Normal(0, std) with zeros in the row of the padding token."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        table = jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)
        return table if pad is None or pad < 0 else table.at[pad].set(0.0)

    return init


# In float16 the residual stream of models that norm all that enters it would pass the largest number (65,504), so it
# carries this part of itself. A power of two changes no digit: in float32 every result would be the same to the bit.
STREAM_SCALES = {"float16": 2.0**-7}


def stream_scale(config: GemmaConfig, dtype: Any) -> float:
    """What part of itself the residual stream carries where the model computes in `dtype`."""
    return STREAM_SCALES.get(jnp.dtype(dtype).name, 1.0) if config.kind.norms_outputs else 1.0


class FlaxGemmaRMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * (offset + weight) * gain, all in float32, cast last. Source: arXiv:1910.07467.

    Fresh weights leave x as it is, as in PyTorch: with an offset of 1 they are zero, for ones would double every norm.
    weighted: whether there is a weight; without one nothing is multiplied.
    """

    eps: float = 1e-6
    offset: float = 1.0
    gain: float = 1.0
    weighted: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., D); same shape and dtype out."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.weighted:  # before the cast: afterwards the half formats would round twice
            weight = self.param("weight", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],))
            y = y * (self.offset + weight.astype(jnp.float32))
        return (y if self.gain == 1.0 else y * self.gain).astype(x.dtype)


class FlaxLinear(nn.Module):
    """A projection with a kernel (in, out), computed in `dtype` whatever its parameters are stored in.

    Where the collection "lora" has `a` (in, r) and `b` (r, out) for it, their product is added. Source:
    arXiv:2106.09685. The collection "products" may say how to multiply: see products.py.
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
        y = product(x, kernel, self.get_variable("products", "kernel"))
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", n).astype(self.dtype) for n in ("a", "b"))
            y = y + (x @ a) @ b
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)
        return y


def rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids], (*ids, D); an id beyond the last row reads that."""
    # XLA's CPU code looks numbers of 16 bits up as float32. It converts those rows alone, but of a table that it knows
    # not to change in a loop the whole, ahead of it.
    table, ids = jax.lax.optimization_barrier((table, ids))
    return jnp.take(table, ids, axis=0, mode="clip")


class FlaxGemmaScaledEmbedding(nn.Module):
    """Token embedding times sqrt(D), the factor rounded to the weight's dtype (7B: 55.5 in bfloat16).

    scaled_by: the D of the factor; None for the width of a row.
    """

    config: GemmaConfig
    rows: int
    width: int
    dtype: Any = jnp.float32
    scaled_by: int | None = None

    def setup(self) -> None:
        init = embedding_init(self.config.initializer_range, self.config.pad_token_id)
        self.embedding = self.param("embedding", init, (self.rows, self.width))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: (B, S) -> (B, S, D)."""
        scale = jnp.asarray((self.scaled_by or self.width) ** 0.5, self.embedding.dtype)
        return (rows_of(self.embedding, ids) * scale).astype(self.dtype)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """The tied head: hidden (B, S, D) -> logits (B, S, V), by the unscaled weights."""
        return product(hidden, self.embedding, self.get_variable("products", "embedding"), by_outputs=True)


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
    spec: LayerSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, S, D), same out."""
        c, width = self.config, self.spec.intermediate_size
        gate = FlaxLinear(width, c.initializer_range, dtype=self.dtype, name="gate_proj")(x)
        up = FlaxLinear(width, c.initializer_range, dtype=self.dtype, name="up_proj")(x)
        down = FlaxLinear(c.hidden_size, c.initializer_range, dtype=self.dtype, name="down_proj")
        return down(activation(c.hidden_act)(gate) * up)


# Cosine and sine of each position; with 1 for B they are every row's.
RotaryTables = tuple[jax.Array, jax.Array]


def rotary_tables(config: GemmaConfig, position_ids: jax.Array, dtype: Any, rope: str = FULL_ATTENTION) -> RotaryTables:
    """position_ids: (B or 1, S) -> cos, sin: (B or 1, 1, S, H) in `dtype`, to broadcast over heads.

    rope: which table, as a LayerSpec names it. Angles are float32 whatever the model's dtype. Types "dynamic" and
    "longrope" depend on the longest position of the call alone.
    """
    inv_freq, scaling = rope_frequencies(config, position_ids, rope)
    angles = position_ids[:, None, :, None].astype(jnp.float32) * inv_freq
    angles = jnp.concatenate((angles, angles), axis=-1)
    return (jnp.cos(angles) * scaling).astype(dtype), (jnp.sin(angles) * scaling).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split layout: feature i turns with feature i + H/2. x: (B, heads, S, H)."""
    half = x.shape[-1] // 2
    return x * cos + jnp.concatenate((-x[..., half:], x[..., :half]), axis=-1) * sin


def rope_frequencies(config: GemmaConfig, position_ids: jax.Array, name: str = FULL_ATTENTION) -> tuple[Any, float]:
    """Inverse frequencies (H/2,) float32 and the factor on cos and sin.

    A table of numpy where the settings alone decide; an array that depends on the positions for the two types whose
    table follows the length of the call.
    """
    rope = config.rope(name)
    length = jnp.max(position_ids) + 1 if rope["rope_type"] in FOLLOW_LENGTH else 0
    return frequencies(rope, config.rotary_dim(name), config.max_position_embeddings, length, _ARRAYS)


_ARRAYS = Arrays(
    lambda n: np.arange(n, dtype=np.float32),
    lambda numbers: np.asarray(numbers, np.float32),
    lambda truth, yes, no: (np if isinstance(truth, np.ndarray) else jnp).where(truth, yes, no),
)
