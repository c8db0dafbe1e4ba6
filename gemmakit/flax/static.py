"""What jit must know before it traces: a configuration that hashes, and outputs that are pytrees."""

from __future__ import annotations

import copy
from dataclasses import fields

import jax
from flax import struct

from gemmakit import outputs
from gemmakit.config import GemmaConfig


class FrozenConfig(GemmaConfig):
    """A copy of a configuration that equals another by what it says: two models of one shape share compiled code.

    A Linen module is a static argument of jit, which compares by hash; a GemmaConfig can change and has none.
    """

    def __init__(self, config: GemmaConfig):
        self.__dict__.update(copy.deepcopy(config.__dict__))
        act = config.hidden_act
        # config.json holds neither; a callable has no name that tells it from another.
        beside = (config.attn_implementation, id(act) if callable(act) else None)
        self._key = (config.to_json_string(), *beside)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenConfig) and self._key == other._key

    def __repr__(self) -> str:  # every error of flax prints the module, and with it this
        return f"FrozenConfig({self.num_hidden_layers} layers of {self.hidden_size})"


@struct.dataclass
class Wanted:
    """What a forward pass is to do besides hidden states. All of it is known before tracing."""

    train: bool = struct.field(pytree_node=False, default=False)
    attentions: bool = struct.field(pytree_node=False, default=False)
    hidden_states: bool = struct.field(pytree_node=False, default=False)


def _register(cls: type) -> None:
    names = [f.name for f in fields(cls)]
    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda out: ([(jax.tree_util.GetAttrKey(n), getattr(out, n)) for n in names], None),
        lambda _, values: cls(**dict(zip(names, values, strict=True))),
    )


# So that a caller's own jitted function may return them.
for _cls in (
    outputs.BaseModelOutputWithPast,
    outputs.CausalLMOutputWithPast,
    outputs.SequenceClassifierOutputWithPast,
    outputs.TokenClassifierOutput,
    outputs.GenerateDecoderOnlyOutput,
    outputs.GenerateBeamDecoderOnlyOutput,
):
    _register(_cls)
