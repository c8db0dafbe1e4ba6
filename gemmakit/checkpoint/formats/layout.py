"""Which tensors a Gemma has, by the names and shapes of its PyTorch layout: data, from a configuration alone.

Axis letters: D hidden, F mlp, N heads, K kv heads, H head_dim, V vocabulary, C labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gemmakit.config import PRESETS, GemmaConfig
from gemmakit.errors import CheckpointError

PREFIX = "model."
# A table that early releases stored and that every model computes.
COMPUTED = ("rotary_emb.inv_freq",)
CAUSAL, SEQUENCE, TOKEN, BARE = (
    "GemmaForCausalLM",
    "GemmaForSequenceClassification",
    "GemmaForTokenClassification",
    "GemmaModel",
)

EMBEDDING = "embed_tokens.weight"
# name within a layer -> shape by axis letters ("NH" is N * H)
LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("D",),
    "self_attn.q_proj.weight": ("NH", "D"),
    "self_attn.k_proj.weight": ("KH", "D"),
    "self_attn.v_proj.weight": ("KH", "D"),
    "self_attn.o_proj.weight": ("D", "NH"),
    "post_attention_layernorm.weight": ("D",),
    "mlp.gate_proj.weight": ("F", "D"),
    "mlp.up_proj.weight": ("F", "D"),
    "mlp.down_proj.weight": ("D", "F"),
}
BIASES: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj.bias": ("NH",),
    "self_attn.k_proj.bias": ("KH",),
    "self_attn.v_proj.bias": ("KH",),
    "self_attn.o_proj.bias": ("D",),
}


def tensor_shapes(config: GemmaConfig, architecture: str = CAUSAL) -> dict[str, tuple[int, ...]]:
    """name -> shape of all that a checkpoint of this class stores, in the customary order; no tied head."""
    axes = {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "NH": config.num_attention_heads * config.head_dim,
        "KH": config.num_key_value_heads * config.head_dim,
    }
    prefix = "" if architecture == BARE else PREFIX
    layer = {**LAYER, **(BIASES if config.attention_bias else {})}
    shapes: dict[str, tuple[int, ...]] = {prefix + EMBEDDING: (axes["V"], axes["D"])}
    for i in range(config.num_hidden_layers):
        shapes.update({f"{prefix}layers.{i}.{name}": tuple(axes[a] for a in shape) for name, shape in layer.items()})
    shapes[f"{prefix}norm.weight"] = (axes["D"],)
    return {**shapes, **_head(config, architecture)}


def _head(config: GemmaConfig, architecture: str) -> dict[str, tuple[int, ...]]:
    D, V, C = config.hidden_size, config.vocab_size, config.num_labels
    if architecture == CAUSAL:
        return {} if config.tie_word_embeddings else {"lm_head.weight": (V, D)}
    if architecture == SEQUENCE:
        return {"score.weight": (C, D)}
    return {"score.weight": (C, D), "score.bias": (C,)} if architecture == TOKEN else {}


def architecture_of(config: GemmaConfig | None, names: Iterable[str]) -> str:
    """The class a checkpoint is of: what config.json says where that can be, else what its names tell."""
    names = set(names)
    if not any(name.startswith((PREFIX, "lm_head.", "score.")) for name in names):
        return BARE
    said = [a for a in (config.architectures if config else None) or () if a in (CAUSAL, SEQUENCE, TOKEN)]
    if said:
        return said[0]
    return CAUSAL if "score.weight" not in names else TOKEN if "score.bias" in names else SEQUENCE


def differences(
    shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """(missing, left over, of another shape): names of `wanted` that `shapes` lacks, and so on.

    Tables that every model computes, and a stored copy of a tied head, are no part of it.
    """
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted and not spare(name, wanted)]
    other = [name for name, shape in wanted.items() if name in shapes and tuple(shapes[name]) != shape]
    return missing, extra, other


def spare(name: str, wanted: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor may be there without being used: what every model computes, the copy of a tied head."""
    return name.endswith(COMPUTED) or (name == "lm_head.weight" and name not in wanted and "score.weight" not in wanted)


def released_size(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """ "2b" or "7b" where the embedding is as wide as that model's; whether the rest fits is `differences`' to say."""
    width = shapes.get(PREFIX + EMBEDDING, ())[-1:]
    return next((size for size, preset in PRESETS.items() if width == (preset["hidden_size"],)), None)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: str) -> GemmaConfig:
    """The configuration of a checkpoint that came without one: a released model's, as shapes do not tell N from H.

    Raises CheckpointError for any other model.
    """
    size = released_size(shapes)
    if size is not None:
        return GemmaConfig.preset(size, vocab_size=shapes[PREFIX + EMBEDDING][0], architectures=[CAUSAL])
    embedding = "x".join(map(str, shapes.get(PREFIX + EMBEDDING, ()))) or "no"
    raise CheckpointError(
        f"{where} comes without a config.json, and with {embedding} embedding it is no released Gemma. "
        "Put the model's config.json beside it, or name one: --config FILE."
    )
