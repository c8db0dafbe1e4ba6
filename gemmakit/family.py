"""What each Gemma is, as data: a member of the family is a row of `KINDS`, a layer of one is a `LayerSpec`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gemmakit.errors import ConfigError

FULL_ATTENTION = "full_attention"  # the kind of layer, and of rotary table, that every member has


class Norms(NamedTuple):
    """The names of a layer's four norms, as checkpoints have them; None for no norm.

    The layer is x + after_attention(attention(before_attention(x))), then x + after_mlp(mlp(before_mlp(x))).
    """

    before_attention: str
    after_attention: str | None
    before_mlp: str
    after_mlp: str | None


@dataclass(frozen=True)
class Kind:
    """What a `model_type` says of every layer and every model.

    norms: of a layer. norm_offset: a norm multiplies by norm_offset + weight. q_norm, k_norm, v_norm: whether each
    head's query, key or value is normed. scale: of the attention scores; None for head_dim to the -1/2. title: what
    people call these models. classes: the public names, by their role. gguf_architecture: the name in a GGUF file.
    """

    title: str
    norms: Norms
    classes: Mapping[str, str]
    gguf_architecture: str
    norm_offset: float = 1.0
    q_norm: bool = False
    k_norm: bool = False
    v_norm: bool = False
    scale: float | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what may differ from layer to layer. `GemmaConfig.layer` makes it; both backends build from it.

    window: keys a query sees, itself included; None for all before it. rope: which rotary table, by the name that
    `GemmaConfig.rope` takes. scale, softcap: scores times scale are capped, softcap * tanh(s / softcap); None for no
    cap. kv_source: the layer whose keys and values this one reads; None for its own.
    """

    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    scale: float
    rope: str = FULL_ATTENTION
    window: int | None = None
    softcap: float | None = None
    kv_source: int | None = None


KINDS: dict[str, Kind] = {
    "gemma": Kind(
        title="Gemma 1, 1.1 and CodeGemma",
        # Here the norm called post_attention stands before the MLP; attention's and the MLP's outputs have none.
        norms=Norms("input_layernorm", None, "post_attention_layernorm", None),
        classes={
            "config": "GemmaConfig",
            "model": "GemmaModel",
            "causal_lm": "GemmaForCausalLM",
            "sequence_classification": "GemmaForSequenceClassification",
            "token_classification": "GemmaForTokenClassification",
        },
        gguf_architecture="gemma",
    ),
}


def kind_of(model_type: object) -> Kind:
    """The member a config.json's `model_type` names. Raises ConfigError for what gemmakit does not run."""
    kind = KINDS.get(model_type) if isinstance(model_type, str) else None
    if kind is None:
        known = " and ".join(f"{kind.title} ({name!r})" for name, kind in KINDS.items())
        raise ConfigError(f"model_type is {model_type!r}: gemmakit runs {known}.")
    return kind


def kept_heads(layer: int, heads: int, kv_heads: int, gone: Collection[int]) -> tuple[list[int], list[int]]:
    """The query heads and the kv heads that a layer keeps without the query heads `gone`.

    Query heads are numbered as in the unpruned model, from 0 to heads - 1; query head n reads kv head
    n // (heads // kv_heads), which goes with its last query head. Raises ConfigError for a head that there is not, and
    where the kv heads that stay would serve different numbers of query heads, which attention cannot compute.
    """
    wrong = sorted(n for n in gone if not 0 <= n < heads)
    if wrong:
        raise ConfigError(f"head {wrong[0]} of layer {layer} does not exist: there are {heads} heads, counted from 0.")
    queries = [n for n in range(heads) if n not in gone]
    served = Counter(n // (heads // kv_heads) for n in queries)
    if not queries:
        raise ConfigError(f"all {heads} heads of layer {layer} would go: at least one must stay.")
    if len(set(served.values())) > 1:
        raise ConfigError(
            f"without heads {sorted(gone)}, the key/value heads of layer {layer} would serve "
            f"{', '.join(str(served[g]) for g in sorted(served))} query heads: take whole groups of "
            f"{heads // kv_heads}, or equally many from every group that stays."
        )
    return queries, sorted(served)
