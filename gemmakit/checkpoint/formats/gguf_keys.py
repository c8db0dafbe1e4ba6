"""What a GGUF file of a Gemma says in its keys, so that llama.cpp runs the model and reads its words."""

from __future__ import annotations

from typing import Any

from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError
from gemmakit.family import FULL_ATTENTION, SLIDING_ATTENTION
from gemmakit.gguf import PLAIN
from gemmakit.gguf_settings import (
    DERIVED,
    MERGED,
    REQUIRED,
    SEEN,
    SHARED_SCALE,
    SPECIAL_IDS,
    TEMPLATE,
    WORDS,
    Entry,
    Vocabulary,
)

# general.file_type: what most of the tensors are
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "BF16": 32}
# What is said of the width of a head, which llama.cpp would have differ.
_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")


def model_keys(config: GemmaConfig, kind: str, name: str) -> dict[str, Any]:
    """What llama.cpp wants to know of a model. Raises ConfigError for what its Gemma cannot do."""
    architecture = config.kind.gguf_architecture
    rope = config.rope(FULL_ATTENTION)
    local = config.rope(SLIDING_ATTENTION) if config.kind.ropes else rope
    wrong = {
        f"model_type={config.model_type!r}": architecture is None,
        f"{config.num_experts} experts": bool(config.enable_moe_block),
        "tie_word_embeddings=False": not config.tie_word_embeddings,
        "attention_bias=True": config.attention_bias,
        f"hidden_act={config.hidden_act!r}": config.hidden_act != "gelu_pytorch_tanh",
        f"rope_type={rope['rope_type']!r}": rope["rope_type"] not in ("default", "linear", *own_rope_types(config)),
        f"rope_type={local['rope_type']!r} in window layers": local is not rope and local["rope_type"] != "default",
        "use_bidirectional_attention=True": not config.is_causal,
        f"scores scaled by {config.layer(0).scale:g}": config.layer(0).scale != _their_scale(config),
        "no layer with a window": config.kind.pattern > 1 and not config.kind.ropes and not any(_windows(config)),
        "attn_logit_softcapping=None": config.kind.capped and not config.attn_logit_softcapping,
        "final_logit_softcapping=None": config.kind.capped and not config.final_logit_softcapping,
        f"vocab_size_per_layer_input={config.vocab_size_per_layer_input}": bool(config.hidden_size_per_layer_input)
        and config.vocab_size_per_layer_input not in (None, config.vocab_size),
    }
    found = [what for what, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ConfigError(
            f"the model has {', '.join(found)}, which llama.cpp's Gemma cannot express: it would compute something "
            "else. Save it as safetensors."
        )
    keys: dict[str, Any] = {key: getattr(config, field) for key, field in {**REQUIRED, **DERIVED}.items()}
    keys["attention.value_length"] = config.head_dim
    keys["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    keys["rope.freq_base"] = float(rope["rope_theta"])
    if rope.get("factor"):
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    keys |= _attention_keys(config, local)
    keys |= _kinds_keys(config) if "global_head_dim" in config.kind.defaults else {}
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        **{f"{architecture}.{key}": value for key, value in keys.items()},
        "general.file_type": FILE_TYPES[kind],
        **({} if kind in PLAIN else {"general.quantization_version": 2}),
    }


def own_rope_types(config: GemmaConfig) -> tuple[str, ...]:
    """The type of the member's own rotary tables, where it is one that others do not have."""
    return tuple(dict.fromkeys(table["rope_type"] for table in config.kind.ropes.values()))


def _their_scale(config: GemmaConfig) -> float:
    """How llama.cpp scales scores: it knows the largest models by their number of layers."""
    if config.kind.scale is not None:
        return config.kind.scale
    shared = config.num_hidden_layers == SHARED_SCALE.get(config.model_type)
    return (config.hidden_size // config.num_attention_heads if shared else config.head_dim) ** -0.5


def _windows(config: GemmaConfig) -> list[int | None]:
    return [config.layer(i).window for i in range(config.num_hidden_layers)]


def _attention_keys(config: GemmaConfig, local: dict[str, Any]) -> dict[str, Any]:
    """Windows and which layers have one, their rotary table, caps; nothing of Gemma 1."""
    if config.kind.pattern == 1:
        return {}
    windows = _windows(config)
    keys: dict[str, Any] = {"attention.sliding_window": next(filter(None, windows), 0)}
    if any(windows):  # llama.cpp stops where a pattern has no window at all
        keys["attention.sliding_window_pattern"] = [window is not None for window in windows]
    if config.kind.ropes:
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    caps = {name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    keys |= {name: float(cap) for name, cap in caps.items() if cap and (config.kind.capped or name.startswith("final"))}
    return keys


def _kinds_keys(config: GemmaConfig) -> dict[str, Any]:
    """What llama.cpp is told of Gemma 4, whose layers differ by their kind."""
    specs = [config.layer(i) for i in range(config.num_hidden_layers)]
    widths = {name: config.rotary_dim(name) for name in (FULL_ATTENTION, SLIDING_ATTENTION)}
    kinds = {"": widths[FULL_ATTENTION], "_swa": widths[SLIDING_ATTENTION]}
    return {
        "feed_forward_length": _one_or_all([spec.intermediate_size for spec in specs]),
        "attention.head_count_kv": _one_or_all([spec.num_key_value_heads for spec in specs]),
        "attention.sliding_window": config.sliding_window or 0,
        "attention.sliding_window_pattern": [spec.window is not None for spec in specs],
        "attention.shared_kv_layers": config.num_kv_shared_layers or 0,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        **{f"{key}{of}": width for of, width in kinds.items() for key in _WIDTHS},
    }


def _one_or_all(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else numbers


def word_keys(vocabulary: Vocabulary, config: GemmaConfig) -> dict[str, Any]:
    """The tokenizer.* keys of a model; ids without a piece get one that no text has."""
    spare = [Entry(f"[PAD{index}]", -1000.0, 5) for index in range(len(vocabulary.entries), config.vocab_size)]
    entries = [*vocabulary.entries, *spare]
    named = {name: text for name, text in vocabulary.templates.items() if name != "default"}
    merged = config.kind.gguf_architecture == MERGED
    if merged:
        entries = [entry._replace(type=4) if entry.text in SEEN else entry for entry in entries]
    return {
        f"{WORDS}model": MERGED if merged else "llama",
        f"{WORDS}pre": MERGED if merged else "default",
        **({f"{WORDS}merges": [" ".join(pair) for pair in vocabulary.merges]} if merged else {}),
        f"{WORDS}tokens": [entry.text for entry in entries],
        f"{WORDS}scores": [float(entry.score) for entry in entries],
        f"{WORDS}token_type": [entry.type for entry in entries],
        **{f"{WORDS}{SPECIAL_IDS[name]}_token_id": index for name, index in vocabulary.special.items()},
        f"{WORDS}add_bos_token": vocabulary.add_bos,
        f"{WORDS}add_eos_token": vocabulary.add_eos,
        f"{WORDS}add_space_prefix": False,
        **({TEMPLATE: vocabulary.templates["default"]} if "default" in vocabulary.templates else {}),
        **({"tokenizer.chat_templates": list(named)} if named else {}),
        **{f"{TEMPLATE}.{name}": text for name, text in named.items()},
    }
