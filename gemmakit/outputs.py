"""What a forward pass returns: named fields that also read by key and by index.

Shapes use B batch, S positions, V vocabulary, D hidden, N heads, K kv heads, T keys, H head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any


class ModelOutput:
    """Fields that are None do not exist for keys, indices, iteration and length, as in the documented outputs."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v for _, v in self.items())

    def items(self) -> list[tuple[str, Any]]:
        return [(f.name, v) for f in fields(self) if (v := getattr(self, f.name)) is not None]  # type: ignore[arg-type]

    def keys(self) -> list[str]:
        return [name for name, _ in self.items()]

    def values(self) -> list[Any]:
        return [v for _, v in self.items()]

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.items()).get(name, default)

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.items())


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """last_hidden_state (B, S, D), after the final norm; hidden_states L+1 of (B, S, D); attentions L of (B, N, S, T).

    The first of hidden_states is the embedding, the last is last_hidden_state.
    """

    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """loss () float32; logits (B, S or logits_to_keep, V); the rest as in BaseModelOutputWithPast."""

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class SequenceClassifierOutputWithPast(ModelOutput):
    """loss (); logits (B, num_labels); the rest as in BaseModelOutputWithPast."""

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """loss (); logits (B, S, num_labels); the rest as in BaseModelOutputWithPast."""

    loss: Any = None
    logits: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """sequences (B, S). A new token each: scores and logits (B, V), attentions and hidden_states a tuple of layers."""

    sequences: Any = None
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None


@dataclass
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """sequences (R, S), with R = B * num_return_sequences, best first; sequences_scores (R,), with output_scores.

    A step each: scores (log probabilities after the processors) and logits (B * num_beams, V), attentions and
    hidden_states a tuple of layers. beam_indices (R, new): the row of `scores` that gave each token, -1 after the end.
    """

    sequences: Any = None
    sequences_scores: Any = None
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    beam_indices: Any = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None
