"""The settings of a Gemma between config.json's names and GGUF's, both ways. Source: llama.cpp's gguf-py constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemmakit.errors import CheckpointError, ConfigError
from gemmakit.gguf.header import GgufHeader, show
from gemmakit.gguf.kinds import PLAIN

PREFIX = "gemma."
EMBEDDING, HEAD = "token_embd.weight", "output.weight"

# gemma.* -> config.json; None where the file may do without, and GemmaConfig then derives it
_REQUIRED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_DERIVED = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_UNDERSTOOD = {
    *_REQUIRED, *_DERIVED, "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.causal",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "vocab_size",
}  # fmt: skip

# general.file_type: what most of the tensors are
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}


def config_values(header: GgufHeader) -> dict[str, Any]:
    """What config.json would hold, from a GGUF's metadata and the shapes of its tensors.

    dtype is that of the matrices, and bfloat16 if any is quantized. Keys beginning with "gemma." that mean nothing to
    GemmaConfig are kept under "gguf". Raises CheckpointError: no Gemma, settings missing, of the wrong type, or of a
    kind that Gemma does not have.
    """
    header.require_gemma()
    vocabulary, width = _embedding_shape(header)
    values: dict[str, Any] = {name: _whole(header, key) for key, name in _REQUIRED.items()}
    values.update({name: _whole(header, key, required=False) for key, name in _DERIVED.items()})
    if values["hidden_size"] != width:
        raise _contradiction(header, "embedding_length", values["hidden_size"], f"{EMBEDDING} has rows of {width}")
    _check_equal(header, values)
    _check_layers(header, values)
    epsilon = header.get(f"{PREFIX}attention.layer_norm_rms_epsilon", float)
    if epsilon is None:
        raise _missing(header, "attention.layer_norm_rms_epsilon")
    kept = {k: v for k, v in header.metadata.items() if k.startswith(PREFIX) and k[len(PREFIX) :] not in _UNDERSTOOD}
    return {
        **values,
        # Stored in 32 bits: 1e-6 comes back as 9.999999974752427e-07.
        "rms_norm_eps": float(f"{epsilon:.7g}"),
        "vocab_size": vocabulary,
        "rope_parameters": _rope(header),
        "tie_word_embeddings": HEAD not in header.tensors,
        "use_bidirectional_attention": None if header.get(f"{PREFIX}attention.causal", bool, True) else True,
        "architectures": ["GemmaForCausalLM"],
        "dtype": matrices_dtype(header),
        **_tokens(header),
        **({"gguf": {key: _plain(value) for key, value in kept.items()}} if kept else {}),
    }


def metadata_of(config: Any, kind: str, name: str) -> dict[str, Any]:
    """What llama.cpp wants to know of a model, from its GemmaConfig; `kind` is a key of FILE_TYPES.

    Raises ConfigError for what llama.cpp's Gemma cannot do: a head of its own, biases, another activation, rotary
    scaling other than linear, bidirectional attention.
    """
    _refuse_unsayable(config)
    keys = {**_REQUIRED, **_DERIVED}
    metadata: dict[str, Any] = {"general.architecture": "gemma", "general.type": "model", "general.name": name}
    metadata.update({PREFIX + key: getattr(config, field) for key, field in keys.items()})
    metadata[f"{PREFIX}attention.value_length"] = config.head_dim
    metadata[f"{PREFIX}attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    metadata[f"{PREFIX}rope.freq_base"] = float(config.rope_theta)
    if config.rope_parameters["rope_type"] == "linear":
        metadata[f"{PREFIX}rope.scaling.type"] = "linear"
        metadata[f"{PREFIX}rope.scaling.factor"] = float(config.rope_parameters["factor"])
    metadata["general.file_type"] = FILE_TYPES[kind]
    if kind not in PLAIN:
        metadata["general.quantization_version"] = 2
    return metadata


def matrices_dtype(header: GgufHeader) -> str:
    """The dtype that a model of these matrices computes in: theirs, or bfloat16 if any of them is quantized."""
    kinds = {tensor.kind.name for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if not kinds <= PLAIN.keys():
        return "bfloat16"
    return PLAIN[kinds.pop()] if len(kinds) == 1 else "float32"


def stored_quantization(header: GgufHeader) -> tuple[dict[str, Any] | None, frozenset[str]]:
    """What of a file stays in its own blocks, as gemmakit's `quantization_config`, and the names of those tensors.

    All projections of Q4_0, or all of Q8_0, whichever are more; and the embedding, which is the head, if its type fits
    beside them. Everything else becomes plain numbers. (None, nothing) if there is nothing to keep.
    """
    projections: dict[str, list[str]] = {"Q4_0": [], "Q8_0": []}
    plain: list[str] = []
    for name, tensor in header.tensors.items():
        if name not in (EMBEDDING, HEAD) and len(tensor.shape) == 2:
            projections.get(tensor.kind.name, plain).append(name)
    kind = max(projections, key=lambda kind: len(projections[kind]))
    if not projections[kind]:
        return None, frozenset()
    bits = 4 if kind == "Q4_0" else 8
    heads = {header.tensors[name].kind.name for name in (EMBEDDING, HEAD) if name in header.tensors}
    fits = heads in ({"Q8_0"}, {kind})
    head = {"Q4_0": 4, "Q8_0": 8}[heads.pop()] if fits else None
    others = {name for names in (plain, *projections.values()) for name in names} - {*projections[kind]}
    config = {
        "quant_method": "gemmakit",
        "bits": bits,
        "group_size": 32,
        "head_bits": head,
        "head_group_size": 32 if (bits, head) == (4, 8) else None,
        "modules_to_not_convert": sorted(others) or None,
    }
    kept = {*projections[kind], *((EMBEDDING, HEAD) if fits else ())}
    return config, frozenset(kept & header.tensors.keys())


def _embedding_shape(header: GgufHeader) -> tuple[int, int]:
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path} has no matrix {EMBEDDING}, so it is no whole model. Download it again.")
    rows, width = embedding.shape
    declared = header.get(f"{PREFIX}vocab_size", int, rows)
    if declared != rows:
        raise _contradiction(header, "vocab_size", declared, f"{EMBEDDING} has {rows} rows")
    return rows, width


def _whole(header: GgufHeader, key: str, required: bool = True) -> int | None:
    """A whole number; an array of one number a layer serves if they are all the same."""
    value = header.metadata.get(PREFIX + key)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if value is None and required:
        raise _missing(header, key)
    if value is not None and type(value) is not int:
        raise CheckpointError(
            f"{header.path}: {PREFIX}{key} is {show(value)}; one whole number for all layers is needed."
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
    """The sizes are those of the tensors, before a model of them is made: a number alone could ask for any memory."""
    layers = sum(name.startswith("blk.") and name.endswith(".attn_norm.weight") for name in header.tensors)
    if values["num_hidden_layers"] != layers:
        raise _contradiction(header, "block_count", values["num_hidden_layers"], f"the file holds {layers} layers")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    head_dim = values["head_dim"] or width // max(1, heads)
    groups = heads if values["num_key_value_heads"] is None else values["num_key_value_heads"]
    for part, keys, rows in (
        ("attn_q", "attention.head_count and key_length", heads * head_dim),
        ("attn_k", "attention.head_count_kv and key_length", groups * head_dim),
        ("ffn_gate", "feed_forward_length", values["intermediate_size"]),
    ):
        name = f"blk.0.{part}.weight"
        found = header.tensors[name].shape if name in header.tensors else None
        if found is not None and found != (rows, width):
            raise _contradiction(header, keys, rows, f"{name} has the shape {found}")


def _rope(header: GgufHeader) -> dict[str, Any]:
    theta = header.get(f"{PREFIX}rope.freq_base", float, 10000.0)
    kind = header.get(f"{PREFIX}rope.scaling.type", str, "none")
    factor = header.get(f"{PREFIX}rope.scaling.factor", float, header.get(f"{PREFIX}rope.scale_linear", float, 1.0))
    if kind == "none" or factor in (0.0, 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    if kind != "linear":
        raise CheckpointError(
            f"{header.path}: {PREFIX}rope.scaling.type is {show(kind)}; of a GGUF, gemmakit reads 'none' and 'linear'. "
            "Load the model from its safetensors files, where the settings are whole."
        )
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _tokens(header: GgufHeader) -> dict[str, Any]:
    """The special ids that are declared; a turn's end ends a sequence too, as llama.cpp has it."""
    out: dict[str, Any] = {}
    for key, name in _TOKENS.items():
        found = header.get(f"tokenizer.ggml.{key}_token_id", int)
        if found is not None:
            out[name] = found
    turn = header.get("tokenizer.ggml.eot_token_id", int)
    if turn is not None and turn != out.get("eos_token_id"):
        out["eos_token_id"] = [out["eos_token_id"], turn] if "eos_token_id" in out else turn
    return out


def _refuse_unsayable(config: Any) -> None:
    rope = config.rope_parameters["rope_type"]
    wrong = {
        "tie_word_embeddings=False": not config.tie_word_embeddings,
        "attention_bias=True": config.attention_bias,
        f"hidden_act={config.hidden_act!r}": config.hidden_act != "gelu_pytorch_tanh",
        f"rope_type={rope!r}": rope not in ("default", "linear"),
        "use_bidirectional_attention=True": bool(config.use_bidirectional_attention),
    }
    found = [what for what, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ConfigError(
            f"the model has {', '.join(found)}, which llama.cpp's Gemma cannot express: it would compute something "
            "else. Save it as safetensors."
        )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, list)) else list(value)


def _missing(header: GgufHeader, key: str) -> CheckpointError:
    return CheckpointError(f"{header.path} lacks {PREFIX}{key}, so the model's shape is not known. Convert it again.")


def _contradiction(header: GgufHeader, key: str, value: Any, other: str) -> CheckpointError:
    return CheckpointError(f"{header.path}: {PREFIX}{key} is {show(value)}, but {other}. Convert it again.")
