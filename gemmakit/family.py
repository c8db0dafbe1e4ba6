"""What each Gemma is, as data: a member of the family is a row of `KINDS`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

from gemmakit.errors import ConfigError

# The kinds of layers, and of rotary tables, as config.json's `layer_types` names them.
FULL_ATTENTION = "full_attention"  # every member has it
SLIDING_ATTENTION = "sliding_attention"
LAYER_TYPES = (SLIDING_ATTENTION, FULL_ATTENTION)


def layer_type(window: int | None) -> str:
    """The kind of a layer with this window, None for none."""
    return FULL_ATTENTION if window is None else SLIDING_ATTENTION


T = TypeVar("T")


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

    title: what people call these models. norms: of a layer. classes: the public names, by their role.
    gguf_architecture: the name in a GGUF file; None where there is none. defaults: of its configuration, where they are
    not Gemma 1's; the settings of `OPTIONAL` that are not among them are not its own. pattern: each so many-th layer
    attends to everything, the others to a window, where `layer_types` does not say; 1 for no windows. ends_full: the
    last layer attends to everything, whatever the pattern. ropes: the tables that `rope_parameters` holds apart, and
    their default settings; empty where one table serves all layers. older_rope_keys: whether config.json says them in
    the older spellings too. norm_offset: a norm multiplies by norm_offset + weight. q_norm, k_norm, v_norm: whether
    each head's query, key or value is normed, a value without a weight. scale: of scores; None for
    `query_pre_attn_scalar`'s. capped: whether `attn_logit_softcapping` is heeded. halves_window: a bidirectional
    model's `sliding_window` counts both sides. layer_scalar: whether a layer's result is multiplied by a stored number.
    """

    title: str
    norms: Norms
    classes: Mapping[str, str]
    gguf_architecture: str | None
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    pattern: int = 1
    ends_full: bool = False
    ropes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    older_rope_keys: bool = True
    norm_offset: float = 1.0
    q_norm: bool = False
    k_norm: bool = False
    v_norm: bool = False
    scale: float | None = None
    capped: bool = False
    halves_window: bool = False
    layer_scalar: bool = False

    @property
    def norms_outputs(self) -> bool:
        """Whether all that enters the residual stream is normed, so that its scale can be chosen."""
        return self.norms.after_attention is not None and self.norms.after_mlp is not None

    def layer_types(self, layers: int) -> list[str]:
        """What each of so many layers attends to."""
        full = {layers - 1} if self.ends_full else set[int]()
        return [
            FULL_ATTENTION if i in full or (i + 1) % self.pattern == 0 else SLIDING_ATTENTION for i in range(layers)
        ]


# Settings that only some members have; a configuration of the others holds None.
OPTIONAL = (
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "global_head_dim",
    "num_global_key_value_heads",
    "attention_k_eq_v",
    "num_kv_shared_layers",
    "use_double_wide_mlp",
    "enable_moe_block",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
)


def _classes(name: str, decoder: str = "", config: str = "", heads: str = "") -> dict[str, str]:
    """By role, the classes called after `name`; decoder, config, heads: where these are called otherwise."""
    heads = heads or name
    return {
        "config": f"{config or name}Config",
        "model": f"{decoder or name}Model",
        "causal_lm": f"{name}ForCausalLM",
        "sequence_classification": f"{heads}ForSequenceClassification",
        "token_classification": f"{heads}ForTokenClassification",
    }


# Attention and MLP each between two norms.
_SANDWICH = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
# The sizes that transformers' configurations of Gemma 2 and later start from.
_SIZES = dict(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
    query_pre_attn_scalar=256, sliding_window=4096, layer_types=None,
)  # fmt: skip
_CAPS = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)

KINDS: dict[str, Kind] = {
    "gemma": Kind(
        title="Gemma 1, 1.1 and CodeGemma",
        # Here the norm called post_attention stands before the MLP; attention's and the MLP's outputs have none.
        norms=Norms("input_layernorm", None, "post_attention_layernorm", None),
        classes=_classes("Gemma"),
        gguf_architecture="gemma",
    ),
    "gemma2": Kind(
        title="Gemma 2",
        norms=_SANDWICH,
        classes=_classes("Gemma2"),
        gguf_architecture="gemma2",
        defaults={**_SIZES, **_CAPS},
        pattern=2,
        capped=True,
    ),
    "gemma3_text": Kind(
        title="Gemma 3",
        norms=_SANDWICH,
        classes=_classes("Gemma3", decoder="Gemma3Text", config="Gemma3Text", heads="Gemma3Text"),
        gguf_architecture="gemma3",
        defaults={
            **_SIZES,
            **dict.fromkeys(_CAPS),
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
        },
        pattern=6,
        ropes={
            SLIDING_ATTENTION: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL_ATTENTION: {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        q_norm=True,
        k_norm=True,
        halves_window=True,
    ),
    "vaultgemma": Kind(
        title="VaultGemma",
        norms=Norms("input_layernorm", None, "pre_feedforward_layernorm", None),
        classes=_classes("VaultGemma"),
        gguf_architecture=None,
        defaults={**_SIZES, **_CAPS},
        pattern=2,
        capped=True,
    ),
    "gemma4_text": Kind(
        title="Gemma 4",
        norms=_SANDWICH,
        classes=_classes("Gemma4", decoder="Gemma4Text", config="Gemma4Text", heads="Gemma4Text"),
        gguf_architecture="gemma4",
        defaults={
            **{name: value for name, value in _SIZES.items() if name != "query_pre_attn_scalar"},
            "vocab_size": 262144,
            "num_hidden_layers": 30,
            "max_position_embeddings": 131072,
            "sliding_window": 512,
            "final_logit_softcapping": None,
            "global_head_dim": 512,
            "num_global_key_value_heads": None,
            "attention_k_eq_v": False,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "enable_moe_block": False,
            "num_experts": None,
            "top_k_experts": None,
            "moe_intermediate_size": None,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262144,
        },
        pattern=6,
        ends_full=True,
        ropes={
            SLIDING_ATTENTION: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL_ATTENTION: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
        },
        older_rope_keys=False,
        norm_offset=0.0,
        q_norm=True,
        k_norm=True,
        v_norm=True,
        scale=1.0,
        halves_window=True,
        layer_scalar=True,
    ),
}
# Checkpoints of text beside images or sound: the member that their `text_config` is.
TEXT_OF = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
# Other names of a member, and what a file that uses one leaves out.
OTHER_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_unified_text": (
        "gemma4_text",
        dict(max_position_embeddings=262144, sliding_window=1024, use_bidirectional_attention="vision",
             hidden_size_per_layer_input=0),
    ),
}  # fmt: skip

_GEMMA3 = dict(vocab_size=262208, sliding_window=1024, rope_scaling={"rope_type": "linear", "factor": 8.0})
_GEMMA3_SMALL = dict(vocab_size=262144, sliding_window=512, max_position_embeddings=32768, num_attention_heads=4,
                     num_key_value_heads=1)  # fmt: skip
_GEMMA4 = dict(model_type="gemma4_text", final_logit_softcapping=30.0)
_GEMMA4_DENSE = dict(_GEMMA4, hidden_size_per_layer_input=0, attention_k_eq_v=True, sliding_window=1024,
                     max_position_embeddings=262144, use_bidirectional_attention="vision")  # fmt: skip

# Sizes by name, each with its model_type. Source: arXiv:2403.08295, 2408.00118, 2503.19786, 2509.20354; the released
# config.json files.
PRESETS: dict[str, dict[str, Any]] = {
    "2b": dict(model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
               num_attention_heads=8, num_key_value_heads=1),
    "7b": dict(model_type="gemma", hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
               num_attention_heads=16, num_key_value_heads=16),
    "gemma2-2b": dict(model_type="gemma2"),
    "gemma2-9b": dict(model_type="gemma2", hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
                      num_attention_heads=16, num_key_value_heads=8),
    "gemma2-27b": dict(model_type="gemma2", hidden_size=4608, intermediate_size=36864, num_hidden_layers=46,
                       num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144),
    "gemma3-270m": dict(model_type="gemma3_text", **_GEMMA3_SMALL, hidden_size=640, intermediate_size=2048,
                        num_hidden_layers=18),
    "gemma3-1b": dict(model_type="gemma3_text", **_GEMMA3_SMALL, hidden_size=1152, intermediate_size=6912,
                      num_hidden_layers=26),
    "gemma3-4b": dict(model_type="gemma3_text", **_GEMMA3, hidden_size=2560, intermediate_size=10240,
                      num_hidden_layers=34),
    "gemma3-12b": dict(model_type="gemma3_text", **_GEMMA3, hidden_size=3840, intermediate_size=15360,
                       num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8),
    "gemma3-27b": dict(model_type="gemma3_text", **_GEMMA3, hidden_size=5376, intermediate_size=21504,
                       num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=16, head_dim=128,
                       query_pre_attn_scalar=168),
    "embeddinggemma-300m": dict(model_type="gemma3_text", vocab_size=262144, sliding_window=512, hidden_size=768,
                                intermediate_size=1152, num_hidden_layers=24, num_attention_heads=3,
                                num_key_value_heads=1, max_position_embeddings=2048, use_bidirectional_attention=True),
    "gemma4-e2b": dict(_GEMMA4, hidden_size=1536, intermediate_size=6144, num_hidden_layers=35, num_key_value_heads=1,
                       sliding_window_pattern=5, num_kv_shared_layers=20, use_double_wide_mlp=True),
    "gemma4-e4b": dict(_GEMMA4, hidden_size=2560, intermediate_size=10240, num_hidden_layers=42, num_key_value_heads=2,
                       num_kv_shared_layers=18),
    "gemma4-12b": dict(_GEMMA4_DENSE, hidden_size=3840, intermediate_size=15360, num_hidden_layers=48,
                       num_attention_heads=16, num_key_value_heads=8, num_global_key_value_heads=1),
    "gemma4-31b": dict(_GEMMA4_DENSE, hidden_size=5376, intermediate_size=21504, num_hidden_layers=60,
                       num_attention_heads=32, num_key_value_heads=16, num_global_key_value_heads=4),
    "gemma4-26b-a4b": dict(_GEMMA4_DENSE, hidden_size=2816, intermediate_size=2112, num_hidden_layers=30,
                           num_attention_heads=16, num_key_value_heads=8, num_global_key_value_heads=2,
                           enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704),
}  # fmt: skip


def kind_of(model_type: object) -> Kind:
    """The member a config.json's `model_type` names. Raises ConfigError for what gemmakit does not run."""
    kind = KINDS.get(model_type) if isinstance(model_type, str) else None
    if kind is None:
        known = ", ".join(f"{kind.title} ({name!r})" for name, kind in KINDS.items())
        raise ConfigError(f"model_type is {model_type!r}: gemmakit runs {known}.")
    return kind


FLAX = "Flax"  # what the names of the second backend's classes begin with


def role_of(class_name: str) -> tuple[str, str] | None:
    """Whose public class this is, by model_type, and in which role; None for somebody else's."""
    name = class_name.removeprefix(FLAX)
    return next(((t, role) for t, kind in KINDS.items() for role, own in kind.classes.items() if own == name), None)


def _name(cls: type, role: str, model_type: str) -> str:
    """The public class beside `cls`, of either backend, that plays the role for another member."""
    return (FLAX if cls.__name__.startswith(FLAX) else "") + kind_of(model_type).classes[role]


def members(base: type) -> dict[str, type]:
    """By name, the classes of all other members beside Gemma 1's `base`: its code under their names."""
    found = role_of(base.__name__)
    assert found is not None
    made: dict[str, type] = {}
    for model_type, kind in KINDS.items():
        name = _name(base, found[1], model_type)
        if name != base.__name__:
            doc = f"`{base.__name__}` of {kind.title}."
            made[name] = type(name, (base,), {"model_type": model_type, "__module__": base.__module__, "__doc__": doc})
    return made


def member_class(cls: type[T], model_type: str) -> type[T]:
    """The class for a `model_type`, asked of `cls`.

    Gemma 1's classes stand for the whole family, so that code written for them loads every member; a class of somebody
    else's is what it is. Raises ConfigError where `cls` is another member's.
    """
    found = role_of(cls.__name__)
    if found is None or found[0] == model_type:
        return cls
    owner, role = found
    right = _name(cls, role, model_type)
    if owner != "gemma":
        raise ConfigError(
            f"{cls.__name__} is for {KINDS[owner].title} and this model_type is {model_type!r}: use {right}, or an "
            "Auto class."
        )
    return getattr(importlib.import_module(cls.__module__), right)


def text_part(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of the text, by the member's own name and keys, of a checkpoint that may read images or sound too.

    Raises ConfigError if it has none.
    """
    text = _text_config(values)
    known = OTHER_NAMES.get(text.get("model_type"))  # type: ignore[arg-type]
    if known is not None:
        name, left_out = known
        text = {**left_out, **text, "model_type": name}
    return without_layer_config(text)


def _text_config(values: dict[str, Any]) -> dict[str, Any]:
    own = TEXT_OF.get(values.get("model_type"))  # type: ignore[arg-type]
    if own is None:
        return dict(values)
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(
            f"model_type is {values['model_type']!r} and there is no text_config: gemmakit runs the text part of such "
            "a checkpoint, and this one has none."
        )
    around = {k: values[k] for k in _AROUND_TEXT if values.get(k) is not None}
    return {**cast("dict[str, Any]", text), **around, "model_type": text.get("model_type", own)}


# What a checkpoint of text and more says of both; for its text too, this is what counts.
_AROUND_TEXT = ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype",
                "quantization_config")  # fmt: skip


# What other libraries say of single layers, and the settings that say it of all full layers.
_OF_FULL_LAYERS = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}


def without_layer_config(values: dict[str, Any]) -> dict[str, Any]:
    """A file's settings with those that it says of single layers (`per_layer_config`) said of all full layers.

    Raises ConfigError where that is not what they are.
    """
    layers = values.get("per_layer_config")
    if layers is None:
        return values
    values = {name: value for name, value in values.items() if name != "per_layer_config"}
    said: list[Any] = [*layers.values()] if isinstance(layers, dict) else [layers]
    alike = all(isinstance(one, dict) and one == said[0] and one.keys() <= _OF_FULL_LAYERS.keys() for one in said)
    types = values.get("layer_types")
    full = None if types is None else {i for i, name in enumerate(types) if name == FULL_ATTENTION}
    if not alike or (full is not None and {int(i) for i in layers if str(i).isdigit()} != full):
        raise ConfigError(
            f"per_layer_config is {layers!r}; gemmakit's layers differ by their kind alone: head_dim and "
            "num_key_value_heads may be said of all full layers, the same of each."
        )
    return {**values, **{_OF_FULL_LAYERS[name]: value for name, value in (said[0] if said else {}).items()}}


def set_layer_types(kind: Kind, values: dict[str, Any], layers: Any) -> None:
    """What so many layers attend to: the first that a file lists; older files say the pattern instead."""
    types, pattern = values.get("layer_types"), values.get("sliding_window_pattern")
    if not isinstance(layers, int) or "layer_types" not in kind.defaults:
        return
    if isinstance(types, list):
        values["layer_types"] = types[:layers] if layers <= len(cast("list[Any]", types)) else None
    elif isinstance(pattern, int) and pattern > 0:
        values["layer_types"] = replace(kind, pattern=pattern).layer_types(layers)
