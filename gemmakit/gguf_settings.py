"""What the header of a GGUF file says of its model and of its vocabulary."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gemmakit.errors import CheckpointError
from gemmakit.family import FULL_ATTENTION, LAYER_TYPES, SLIDING_ATTENTION
from gemmakit.gguf import PLAIN, GgufHeader, Texts, show

WORDS = "tokenizer.ggml."
EMBEDDING, HEAD, TABLE = "token_embd.weight", "output.weight", "per_layer_token_embd.weight"
# What the angles of full layers are divided by, one number for each two features: a setting in a tensor's form.
ROPE_FACTORS = "rope_freqs.weight"
# Of features that do not turn.
STANDS_STILL = 1e30

# Of the keys about a model -> config.json; None where the file may do without, and GemmaConfig then derives it
REQUIRED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
DERIVED = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
_UNDERSTOOD = {
    *REQUIRED, *DERIVED, "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.causal",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "vocab_size", "attention.sliding_window", "attention.sliding_window_pattern", "attn_logit_softcapping",
    "final_logit_softcapping", "rope.freq_base_swa", "attention.key_length_swa", "attention.value_length_swa",
    "rope.dimension_count_swa", "attention.shared_kv_layers", "embedding_length_per_layer_input",
}  # fmt: skip
# Layers of the members' 27B: llama.cpp scales their scores by the width of a head that all heads would share.
SHARED_SCALE = {"gemma2": 46, "gemma3_text": 62}


def config_values(header: GgufHeader) -> dict[str, Any]:
    """What config.json would hold, from a GGUF's metadata and the shapes of its tensors.

    dtype is that of the matrices, and bfloat16 if any is quantized. Keys about the model that mean nothing to
    GemmaConfig are kept under "gguf". Raises CheckpointError: no Gemma, settings missing, of the wrong type, or of a
    kind that Gemma does not have.
    """
    model_type, prefix = header.require_gemma(), header.prefix
    vocabulary, width = _embedding_shape(header)
    own = gemma4_values(header) if "global_head_dim" in header.kind.defaults else {}
    values: dict[str, Any] = {
        name: own[name] if name in own else _whole(header, key, required=key in REQUIRED)
        for key, name in {**REQUIRED, **DERIVED}.items()
    }
    if values["hidden_size"] != width:
        raise _contradiction(header, "embedding_length", values["hidden_size"], f"{EMBEDDING} has rows of {width}")
    _check_layers(header, values)
    if not own:
        _check_equal(header, values)
        _check_shapes(header, 0, values)
        own = _attention(header, values)
    epsilon = header.get(f"{prefix}attention.layer_norm_rms_epsilon", float)
    if epsilon is None:
        raise _missing(header, "attention.layer_norm_rms_epsilon")
    others = {k: v for k, v in header.metadata.items() if k.startswith(prefix) and k[len(prefix) :] not in _UNDERSTOOD}
    kept = {key: list(value) if isinstance(value, Texts) else value for key, value in others.items()}
    return {
        "model_type": model_type,
        **values,
        **own,
        # Stored in 32 bits: 1e-6 comes back as 9.999999974752427e-07.
        "rms_norm_eps": float(f"{epsilon:.7g}"),
        "vocab_size": vocabulary,
        "rope_parameters": _rope(header),
        "tie_word_embeddings": HEAD not in header.tensors,
        "use_bidirectional_attention": None if header.get(f"{prefix}attention.causal", bool, True) else True,
        "architectures": [header.kind.classes["causal_lm"]],
        "dtype": matrices_dtype(header),
        **_tokens(header),
        **({"gguf": kept} if kept else {}),
    }


def matrices_dtype(header: GgufHeader) -> str:
    """The dtype that a model of these matrices computes in: theirs, or bfloat16 if any of them is quantized."""
    kinds = {tensor.kind.name for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if not kinds <= PLAIN.keys():
        return "bfloat16"
    return PLAIN[kinds.pop()] if len(kinds) == 1 else "float32"


def _embedding_shape(header: GgufHeader) -> tuple[int, int]:
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path} has no matrix {EMBEDDING}, so it is no whole model. Download it again.")
    rows, width = embedding.shape
    declared = header.get(f"{header.prefix}vocab_size", int, rows)
    if declared != rows:
        raise _contradiction(header, "vocab_size", declared, f"{EMBEDDING} has {rows} rows")
    return rows, width


def _whole(header: GgufHeader, key: str, required: bool = True) -> int | None:
    """A whole number; an array of one number a layer serves if they are all the same."""
    value = header.metadata.get(header.prefix + key)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if value is None and required:
        raise _missing(header, key)
    if value is not None and type(value) is not int:
        raise CheckpointError(
            f"{header.path}: {header.prefix}{key} is {show(value)}; one whole number for all layers is needed."
        )
    return value


def _check_equal(header: GgufHeader, values: Mapping[str, Any]) -> None:
    """Gemma's heads have one width, which is rotated whole."""
    width = values["head_dim"] or values["hidden_size"] // max(1, values["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        found = _whole(header, key, required=False)
        if found is not None and found != width:
            raise _contradiction(header, key, found, f"heads have {width} numbers, all of them rotated")


def _check_layers(header: GgufHeader, values: Mapping[str, Any]) -> None:
    layers = sum(name.startswith("blk.") and name.endswith(".attn_norm.weight") for name in header.tensors)
    if values["num_hidden_layers"] != layers:
        raise _contradiction(header, "block_count", values["num_hidden_layers"], f"the file holds {layers} layers")


def _check_shapes(header: GgufHeader, layer: int, values: Mapping[str, Any]) -> None:
    """The sizes are those of the tensors, before a model of them is made: a number alone could ask for any memory."""
    heads, width = values["num_attention_heads"], values["hidden_size"]
    head_dim = values["head_dim"] or width // max(1, heads)
    groups = heads if values["num_key_value_heads"] is None else values["num_key_value_heads"]
    for part, keys, rows in (
        ("attn_q", "attention.head_count and key_length", heads * head_dim),
        ("attn_k", "attention.head_count_kv and key_length", groups * head_dim),
        ("ffn_gate", "feed_forward_length", values["intermediate_size"]),
    ):
        tensor = header.tensors.get(f"blk.{layer}.{part}.weight")
        if tensor is not None and tensor.shape != (rows, width):
            raise _contradiction(header, keys, rows, f"blk.{layer}.{part}.weight has the shape {tensor.shape}")


def _attention(header: GgufHeader, values: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 say of attention: windows, caps, the scale of scores; nothing of Gemma 1."""
    kind, prefix, layers = header.kind, header.prefix, values["num_hidden_layers"]
    if kind.pattern == 1:
        return {}
    found: dict[str, Any] = {}
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = header.get(f"{prefix}{cap}", float)
        if value is not None:
            found[cap] = value or None
    heads, head_dim = values["num_attention_heads"], values["head_dim"]
    shared = layers == SHARED_SCALE[header.require_gemma()]
    found["query_pre_attn_scalar"] = values["hidden_size"] // heads if shared or head_dim is None else head_dim
    window = _whole(header, "attention.sliding_window", required=False)
    if window is not None and window > 0:
        return {**found, "sliding_window": window, "layer_types": _layer_types(header, layers)}
    if window is None and not kind.ropes:
        return {**found, "layer_types": _layer_types(header, layers)}  # Gemma 2's window is understood
    return {**found, "layer_types": [FULL_ATTENTION] * layers}


def _layer_types(header: GgufHeader, layers: int) -> list[str]:
    """By the pattern: each n-th layer sees everything, or a list of which have a window; by default the member's n."""
    pattern = header.metadata.get(f"{header.prefix}attention.sliding_window_pattern", header.kind.pattern)
    if type(pattern) is int and pattern > 0:
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise _contradiction(header, "attention.sliding_window_pattern", pattern, f"there are {layers} layers")
    return [SLIDING_ATTENTION if windowed else FULL_ATTENTION for windowed in pattern]


def _rope(header: GgufHeader) -> dict[str, Any]:
    """The rotary table, or where window layers have their own, both."""
    prefix = header.prefix
    theta = header.get(f"{prefix}rope.freq_base", float, 10000.0)
    kind = header.get(f"{prefix}rope.scaling.type", str, "linear")
    factor = header.get(f"{prefix}rope.scaling.factor", float, header.get(f"{prefix}rope.scale_linear", float, 1.0))
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{header.path}: {prefix}rope.scaling.type is {show(kind)}; of a GGUF, gemmakit reads 'none' and 'linear'. "
            "Load the model from its safetensors files, where the settings are whole."
        )
    table: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind == "linear" and factor not in (0.0, 1.0):
        table = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if not header.kind.ropes:
        return table
    if header.kind.ropes[FULL_ATTENTION]["rope_type"] == "proportional":
        table |= {"rope_type": "proportional", "partial_rotary_factor": _turning_part(header)}
    local = header.get(f"{prefix}rope.freq_base_swa", float, header.kind.ropes[SLIDING_ATTENTION]["rope_theta"])
    return {SLIDING_ATTENTION: {"rope_type": "default", "rope_theta": local}, FULL_ATTENTION: table}


# -- Gemma 4: layers differ by their kind, and the last ones may have no keys of their own -----------------------------


def gemma4_values(header: GgufHeader) -> dict[str, Any]:
    """config.json's settings of Gemma 4's attention, MLP and per-layer embeddings. Raises CheckpointError."""
    layers = _whole(header, "block_count")
    assert layers is not None
    if layers < 1:
        raise _contradiction(header, "block_count", layers, "a model has at least one layer")
    types = _layer_types(header, layers)
    shared = _whole(header, "attention.shared_kv_layers", required=False) or 0
    own = [i for i in range(layers) if i < layers - shared]
    kv = _of_layers(header, "attention.head_count_kv", layers)
    by_kind = {name: next((kv[i] for i in range(layers) if types[i] == name), None) for name in LAYER_TYPES}
    if any(kv[i] != by_kind[types[i]] for i in range(layers)):
        raise _contradiction(header, "attention.head_count_kv", kv, "layers of one kind have the same number of heads")
    window_kv, full_kv = (by_kind[name] for name in LAYER_TYPES)
    without_values = [i for i in own if f"blk.{i}.attn_v.weight" not in header.tensors]
    values_are_keys = bool(without_values)
    if values_are_keys and without_values != [i for i in own if types[i] == FULL_ATTENTION]:
        raise CheckpointError(
            f"{header.path}: the layers {without_values} have no attn_v; Gemma 4 takes keys as values in all layers "
            "without a window or in none. Convert it again."
        )
    if None not in by_kind.values() and window_kv != full_kv and not values_are_keys:
        raise _contradiction(
            header, "attention.head_count_kv", kv, "kinds of layers differ in it only where full ones have no attn_v"
        )
    mlp = _of_layers(header, "feed_forward_length", layers)
    double = bool(shared) and mlp[-1] == 2 * mlp[0]
    if mlp != [mlp[0] * (2 if double and i not in own else 1) for i in range(layers)]:
        raise _contradiction(
            header, "feed_forward_length", mlp, "only layers that read others' keys may be twice as wide"
        )
    wide = _whole(header, "embedding_length_per_layer_input", required=False) or 0
    table = header.tensors.get(TABLE)
    values = {
        "num_key_value_heads": full_kv if window_kv is None else window_kv,
        "num_global_key_value_heads": full_kv if values_are_keys else None,
        "attention_k_eq_v": values_are_keys,
        "intermediate_size": mlp[0],
        "use_double_wide_mlp": double,
        "num_kv_shared_layers": shared,
        "head_dim": _head_width(header, "_swa"),
        "global_head_dim": _head_width(header, ""),
        "layer_types": types,
        "sliding_window": _whole(header, "attention.sliding_window"),
        "final_logit_softcapping": header.get(f"{header.prefix}final_logit_softcapping", float) or None,
        "hidden_size_per_layer_input": wide,
        "vocab_size_per_layer_input": _embedding_shape(header)[0] if table is None else table.shape[0],
    }
    _check_kinds(header, values, types, kv)
    return values


def _of_layers(header: GgufHeader, key: str, layers: int) -> list[int]:
    """A whole number for each layer, of a file that says one for all or a list."""
    value = header.metadata.get(header.prefix + key)
    if isinstance(value, list) and len(value) == layers and all(type(item) is int for item in value):
        return value
    whole = _whole(header, key)
    assert whole is not None
    return [whole] * layers


def _head_width(header: GgufHeader, of: str) -> int:
    """Width of the heads of full layers, or ("_swa") of those with a window: of keys and values, rotated whole."""
    width = _whole(header, f"attention.key_length{of}")
    assert width is not None
    for key in (f"attention.value_length{of}", f"rope.dimension_count{of}"):
        found = _whole(header, key, required=False)
        if found is not None and found != width:
            raise _contradiction(header, key, found, f"attention.key_length{of} is {width}")
    return width


def _check_kinds(header: GgufHeader, values: Mapping[str, Any], types: list[str], kv: list[int]) -> None:
    """The first layer of each kind has the shapes that the settings say."""
    sizes = {name: _whole(header, key) for key, name in REQUIRED.items() if name not in values}
    for name in dict.fromkeys(types):
        first = types.index(name)
        wide = values["global_head_dim" if name == FULL_ATTENTION else "head_dim"]
        _check_shapes(header, first, {**sizes, **values, "head_dim": wide, "num_key_value_heads": kv[first]})


def _turning_part(header: GgufHeader) -> float:
    """The part of a head's features that turns in full layers: ROPE_FACTORS divides the angles of the others away."""
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        raise CheckpointError(f"{header.path} lacks {ROPE_FACTORS}, which says how its layers turn. Convert it again.")
    half = _head_width(header, "") // 2
    if tensor.kind.name != "F32" or tensor.shape != (half,):
        raise CheckpointError(
            f"{header.path}: {ROPE_FACTORS} is {tensor.kind.name} of the shape {tensor.shape}; F32 of {(half,)} is "
            "needed. Convert it again."
        )
    with header.path.open("rb") as file:
        file.seek(tensor.begin)
        factors: tuple[float, ...] = struct.unpack(f"<{half}f", file.read(4 * half))
    turning = next((i for i, factor in enumerate(factors) if factor != 1.0), half)
    if not turning or any(factor < STANDS_STILL / 2 for factor in factors[turning:]):
        raise CheckpointError(
            f"{header.path}: {ROPE_FACTORS} holds {show(min(factors))} to {show(max(factors))}; in Gemma 4's the first "
            f"ones are 1, and the others are {STANDS_STILL:g}. Load the model from its safetensors files."
        )
    return turning / half


def is_setting(header: GgufHeader, name: str) -> bool:
    """Whether a tensor of the file is a setting, which `config_values` has read."""
    ropes = header.kind.ropes.get(FULL_ATTENTION, {})
    return name == ROPE_FACTORS and ropes.get("rope_type") == "proportional"


def _tokens(header: GgufHeader) -> dict[str, Any]:
    """The special ids that are declared; a turn's end ends a sequence too, as llama.cpp has it."""
    ids = special_ids(header)
    out: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    ends = [ids[name] for name in ("eos", "eot") if name in ids]
    if header.get(f"{WORDS}model", str) == MERGED:
        texts = header.metadata.get(f"{WORDS}tokens", ())
        ends += [index for index, text in enumerate(texts) if text in ENDS]
    ends = list(dict.fromkeys(ends))
    return {**out, "eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else out


def _missing(header: GgufHeader, key: str) -> CheckpointError:
    return CheckpointError(
        f"{header.path} lacks {header.prefix}{key}, so the model's shape is not known. Convert it again."
    )


def _contradiction(header: GgufHeader, key: str, value: Any, other: str) -> CheckpointError:
    return CheckpointError(f"{header.path}: {header.prefix}{key} is {show(value)}, but {other}. Convert it again.")


# our name for a special id -> GGUF's
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "mask": "mask", "eot": "eot"}
TEMPLATE = "tokenizer.chat_template"
# What `tokenizer.ggml.model` says of pieces that are joined by a list of merges and have no scores of their own: Gemma
# 4's. llama.cpp knows by their text which of its tokens end an answer, and which its parser of answers has to see.
MERGED = "gemma4"
ENDS = ("<eos>", "<turn|>", "<|tool_response>")
SEEN = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')


class Entry(NamedTuple):
    """A piece; `type` as in SentencePiece: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of a tokenizer of SentencePiece's kind. `entries[i]` has id i.

    special: ids of bos, eos, pad, unk, mask and eot (the end of a turn), as far as there are any.
    templates: chat templates by name, the usual one as "default". merges: what the scores say, as pairs of pieces that
    are joined, the first ones first.
    """

    entries: list[Entry]
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = True
    add_eos: bool = False
    templates: dict[str, str] = field(default_factory=dict)
    merges: Sequence[tuple[str, str]] = ()


def special_ids(header: GgufHeader) -> dict[str, int]:
    """The ids of bos, eos, pad, unk, mask and eot (the end of a turn), as far as they are declared."""
    found = {name: header.get(f"{WORDS}{theirs}_token_id", int) for name, theirs in SPECIAL_IDS.items()}
    return {name: index for name, index in found.items() if index is not None}
