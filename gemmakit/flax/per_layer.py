"""What each layer of Gemma 4's small sizes reads beside the stream: an embedding of the token, made for that layer.

The model holds one table for all layers, whose rows are read by token, and a projection of the ordinary embedding; a
layer lets their sum through a gate that the stream opens. Called within a module's `__call__`, these functions make
their parts there, under the names of the released checkpoints.
Axis letters: B batch, S positions, D hidden, L layers, P width of a layer's own embedding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError
from gemmakit.flax.layers import FlaxGemmaRMSNorm, FlaxGemmaScaledEmbedding, FlaxLinear, activation, stream_scale


def check_rows(config: GemmaConfig) -> None:
    """Raises ConfigError where layers lack embeddings for ids of the vocabulary: compiled code cannot say which."""
    rows = config.vocab_size_per_layer_input
    if config.hidden_size_per_layer_input and rows is not None and rows < config.vocab_size:
        raise ConfigError(
            f"vocab_size_per_layer_input is {rows} and vocab_size {config.vocab_size}: the Flax backend needs an "
            "embedding of each layer for every id. Use the PyTorch backend, or make both the same."
        )


def layer_inputs(config: GemmaConfig, dtype: Any, ids: jax.Array, embeds: jax.Array) -> jax.Array:
    """What each layer reads, (B, S, L, P): the tokens' part and what is projected from their ordinary embeddings.

    ids: (B, S); embeds: (B, S, D).
    """
    P, L = config.hidden_size_per_layer_input, config.num_hidden_layers
    assert P
    rows = config.vocab_size_per_layer_input or config.vocab_size
    table = FlaxGemmaScaledEmbedding(config, rows, L * P, dtype, scaled_by=P, name="embed_tokens_per_layer")
    projection = FlaxLinear(L * P, config.initializer_range, dtype=dtype, name="per_layer_model_projection")
    norm = FlaxGemmaRMSNorm(config.rms_norm_eps, config.kind.norm_offset, name="per_layer_projection_norm")
    tokens = table(ids).reshape(*ids.shape, L, P)
    projected = _times(projection(embeds), embeds.shape[-1] ** -0.5).reshape(tokens.shape)
    return _times(norm(projected) + tokens, 2.0**-0.5)


def added(config: GemmaConfig, dtype: Any, x: jax.Array, inputs: jax.Array) -> jax.Array:
    """What a layer adds to its stream. x: (B, S, D), same out; inputs: (B, S, P)."""
    scale, std = stream_scale(config, dtype), config.initializer_range
    gate = FlaxLinear(inputs.shape[-1], std, dtype=dtype, name="per_layer_input_gate")(x)
    gate = activation(config.hidden_act)(gate if scale == 1.0 else gate / scale)
    out = FlaxLinear(x.shape[-1], std, dtype=dtype, name="per_layer_projection")(gate * inputs)
    norm = FlaxGemmaRMSNorm(config.rms_norm_eps, config.kind.norm_offset, scale, name="post_per_layer_input_norm")
    return norm(out)


def _times(x: jax.Array, number: float) -> jax.Array:
    """The product rounded once, as PyTorch has it: beside an array of bfloat16 jax would round the number first."""
    return (x.astype(jnp.float32) * number).astype(x.dtype)
