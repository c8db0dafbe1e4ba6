"""What a token costs: bytes read to decode one, multiplications to read one. The floors that speeds are held against.

Axis letters: D hidden, F mlp, N heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemmakit.config import GemmaConfig

EMBEDDING, HEAD = "model.embed_tokens.", "lm_head."


@dataclass(frozen=True)
class Weights:
    """Bytes of a GemmaForCausalLM that a decoding step reads: of its layers and norms, and of its head."""

    layers: int
    head: int
    head_dtype: str

    @property
    def total(self) -> int:
        return self.layers + self.head


def weights_read(model: Any) -> Weights:
    """Counted over the model's own tensors, in the format they are in: codes, scales and zeros of packed weights too.

    Of an embedding table that is not also the head only a row is read, which is left out.
    """
    tensors = model.state_dict()
    head = [name for name in tensors if name.startswith(HEAD)] or [n for n in tensors if n.startswith(EMBEDDING)]
    layers = [name for name in tensors if not name.startswith((HEAD, EMBEDDING))]
    dtype = next(str(tensors[name].dtype) for name in head if name.endswith("weight")).removeprefix("torch.")
    return Weights(_bytes(tensors, layers), _bytes(tensors, head), dtype)


def _bytes(tensors: dict[str, Any], names: list[str]) -> int:
    return sum(tensors[name].nbytes for name in names)


def kv_bytes(config: GemmaConfig, itemsize: int) -> int:
    """Bytes of keys and values a token of context, all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def linear_weights(config: GemmaConfig) -> int:
    """Elements of the projections of all layers, without the head."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.num_hidden_layers * (D * H * heads + 3 * D * F)


def prefill_flops(config: GemmaConfig) -> int:
    """Operations to read a prompt token: a multiplication and an addition a weight. The head runs once a prompt, and
    attention's own products grow with the prompt; both are left out, so shares are slightly low.
    """
    return 2 * linear_weights(config)


def training_flops(config: GemmaConfig, tokens: int) -> int:
    """Operations of a training step over one sequence: 6 a weight and token, head included, and 12 * N * H * S / 2 a
    layer and token for causal attention. Source: arXiv:2204.02311, appendix B.
    """
    weights = linear_weights(config) + config.vocab_size * config.hidden_size
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    return tokens * (6 * weights + attention)
