"""What a forward pass returns: named fields that also read by key and by index.

Shapes use B batch, S positions, V vocabulary, D hidden, N heads, K kv heads, T keys, H head_dim, L layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class ModelOutput(OrderedDict[str, Any]):
    """A mapping of the fields that are not None, in their order; each is an attribute too, and has an index.

    A call may give its fields as one mapping or as pairs, as libraries do that make a mapping like another.
    """

    def __post_init__(self) -> None:
        names = self.field_names()
        if list(self) != names[:1]:
            return
        given = self[names[0]]
        if isinstance(given, Mapping | Iterator) and (pairs := dict(given)).keys() <= {*names}:
            setattr(self, names[0], None)
            for name, value in pairs.items():
                setattr(self, name, value)

    @classmethod
    def field_names(cls) -> list[str]:
        return [*cls.__dataclass_fields__]  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        names = self.field_names()
        if name not in names:
            return
        if value is not None and name in self:
            OrderedDict.__setitem__(self, name, value)
        elif value is not None:
            OrderedDict.__setitem__(self, name, value)
            for later in names[names.index(name) + 1 :]:
                if later in self:
                    self.move_to_end(later)
        elif name in self:
            OrderedDict.__delitem__(self, name)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.field_names():
            raise KeyError(f"{type(self).__name__} has no field {key!r}.")
        setattr(self, key, value)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def pop(self, key: str, *default: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a field's value out; the field is None then."""
        value = super().__getitem__(key) if key in self or not default else default[0]
        setattr(self, key, None)
        return value

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        """Take the last field out, or the first; the field is None then."""
        key = next(reversed(self) if last else iter(self), None)
        if key is None:
            raise KeyError(f"{type(self).__name__} has no field left.")
        return key, self.pop(key)

    def clear(self) -> None:
        """Make each field None."""
        for key in [*self]:
            self.pop(key)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, name) for name in self.field_names())

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields that are not None."""
        return tuple(self.values())


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
