"""Which tensors a Gemma has, by the names and shapes of its PyTorch layout, and how those of a file differ.

Loading into either backend, converting and inspecting ask `differences`.

Axis letters: D hidden, F mlp, N heads, K kv heads, H head_dim, V vocabulary, C labels, L layers, P width of a layer's
own embedding, E experts, M width of an expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from gemmakit.checkpoint.checkpoint import Checkpoint
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError
from gemmakit.family import KINDS, PRESETS, Kind, kind_of, role_of
from gemmakit.layer_spec import LayerSpec, kv_heads

PREFIX = "model."
# Heads that another class of this family may or may not have.
HEADS = ("lm_head.", "score.")
# A table that early releases stored and that every model computes.
COMPUTED = ("rotary_emb.inv_freq",)
# Of layers that read the keys and values of others, whose releases store some all the same.
_QUERY, _KEY = ".self_attn.q_proj.weight", ".self_attn.k_proj.weight"
_KEYS = (_KEY, ".self_attn.v_proj.weight", ".self_attn.k_norm.weight")
# Roles in `family.Kind.classes`.
CAUSAL, SEQUENCE, TOKEN, BARE = "causal_lm", "sequence_classification", "token_classification", "model"

Shape = tuple[int, ...]
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
# Within a layer, in the customary order -> shape by axis letters ("NH" is N * H); norms stand between.
ATTENTION: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj.weight": ("NH", "D"),
    "self_attn.k_proj.weight": ("KH", "D"),
    "self_attn.v_proj.weight": ("KH", "D"),
    "self_attn.o_proj.weight": ("D", "NH"),
}
MLP: dict[str, tuple[str, ...]] = {
    "mlp.gate_proj.weight": ("F", "D"),
    "mlp.up_proj.weight": ("F", "D"),
    "mlp.down_proj.weight": ("D", "F"),
}
# Where layers have embeddings of their own, P wide, of which one table holds all L.
PER_LAYER: dict[str, tuple[str, ...]] = {
    "per_layer_input_gate.weight": ("P", "D"),
    "per_layer_projection.weight": ("D", "P"),
    "post_per_layer_input_norm.weight": ("D",),
}
PER_LAYER_TABLES: dict[str, tuple[str, ...]] = {
    "embed_tokens_per_layer.weight": ("VP", "LP"),
    "per_layer_model_projection.weight": ("LP", "D"),
    "per_layer_projection_norm.weight": ("P",),
}
SCALAR = "layer_scalar"
# Where E experts stand beside the MLP, M wide ("2M" is gate and up).
EXPERTS: dict[str, tuple[str, ...]] = {
    "router.proj.weight": ("E", "D"),
    "router.scale": ("D",),
    "router.per_expert_scale": ("E",),
    "experts.gate_up_proj": ("E", "2M", "D"),
    "experts.down_proj": ("E", "D", "M"),
    "post_feedforward_layernorm_1.weight": ("D",),
    "pre_feedforward_layernorm_2.weight": ("D",),
    "post_feedforward_layernorm_2.weight": ("D",),
}


# One tensor for all experts, whose rows stand below each other where it is a matrix.
EXPERT_MATRICES = ("experts.gate_up_proj", "experts.down_proj")


def as_matrix(shape: Iterable[int]) -> Shape:
    """(O, I) of a weight, the rows of several below each other."""
    *rows, columns = shape
    return (prod(rows), columns)


def tensor_shapes(config: GemmaConfig, architecture: str = "GemmaForCausalLM") -> dict[str, Shape]:
    """name -> shape of all that a checkpoint of this class stores, in the customary order; no tied head."""
    role = _role(architecture)
    prefix, D = "" if role == BARE else PREFIX, config.hidden_size
    shapes: dict[str, Shape] = {prefix + EMBEDDING: (config.vocab_size, D)}
    if P := config.hidden_size_per_layer_input:
        rows = config.vocab_size_per_layer_input or config.vocab_size
        axes = {"P": P, "LP": config.num_hidden_layers * P, "VP": rows, "D": D}
        shapes |= {prefix + name: tuple(axes[a] for a in shape) for name, shape in PER_LAYER_TABLES.items()}
    for i in range(config.num_hidden_layers):
        shapes.update({f"{prefix}layers.{i}.{name}": shape for name, shape in _layer(config, i).items()})
    shapes[f"{prefix}norm.weight"] = (D,)
    return {**shapes, **_head(config, role)}


def _layer(config: GemmaConfig, index: int) -> dict[str, Shape]:
    spec, kind = config.layer(index), config.kind
    axes = {
        "D": config.hidden_size,
        "F": spec.intermediate_size,
        "NH": config.num_attention_heads * spec.head_dim,
        "KH": kv_heads(config, index) * spec.head_dim,
        "H": spec.head_dim,
        "P": config.hidden_size_per_layer_input or 0,
        "E": config.num_experts or 0,
        "M": config.moe_intermediate_size or 0,
        "2M": 2 * (config.moe_intermediate_size or 0),
    }
    first, *others = _norms(kind)
    attention = {name: shape for name, shape in ATTENTION.items() if not _is_elsewhere(name, spec)}
    head_norms = [name for name in _head_norms(kind) if not _is_elsewhere(name, spec)]
    biases = {f"{name.removesuffix('weight')}bias": (axis,) for name, (axis, _) in attention.items()}
    names = {first: ("D",), **attention, **dict.fromkeys(head_norms, ("H",)), **dict.fromkeys(others, ("D",)), **MLP}
    names |= biases if config.attention_bias else {}
    names |= EXPERTS if config.enable_moe_block else {}
    names |= PER_LAYER if axes["P"] else {}
    shapes = {name: tuple(axes[a] for a in shape) for name, shape in names.items()}
    return {**shapes, SCALAR: (1,)} if kind.layer_scalar else shapes


def _is_elsewhere(name: str, spec: LayerSpec) -> bool:
    """Whether a layer goes without this part of its attention, for another gives what it would."""
    part = name.split(".")[1]
    return (part == "v_proj" and spec.values_are_keys) or (part[0] in "kv" and spec.kv_source is not None)


def _head(config: GemmaConfig, role: str) -> dict[str, Shape]:
    D, V, C = config.hidden_size, config.vocab_size, config.num_labels
    if role == CAUSAL:
        return {} if config.tie_word_embeddings else {HEAD: (V, D)}
    if role == SEQUENCE:
        return {"score.weight": (C, D)}
    return {"score.weight": (C, D), "score.bias": (C,)} if role == TOKEN else {}


def _role(architecture: str) -> str:
    found = role_of(architecture)
    return CAUSAL if found is None else found[1]


def architecture_of(config: GemmaConfig | None, names: Iterable[str]) -> str:
    """The class a checkpoint is of: what config.json says where that can be, else what its names tell."""
    classes = kind_of("gemma").classes if config is None else config.kind.classes
    return classes[_role_told(config, set(names))]


def _role_told(config: GemmaConfig | None, names: set[str]) -> str:
    if not any(name.startswith((PREFIX, "lm_head.", "score.")) for name in names):
        return BARE
    said = [role_of(a) for a in (config.architectures if config else None) or ()]
    roles = [found[1] for found in said if found is not None and found[1] != BARE]
    if roles:
        return roles[0]
    return CAUSAL if "score.weight" not in names else TOKEN if "score.bias" in names else SEQUENCE


@dataclass(frozen=True)
class Differences:
    """How the tensors of a file differ from those that a model wants. `names` are the wanted ones, by the file's name.

    missing, fresh: wanted and not there; of `fresh`, heads that another class of the family lacks, new ones are made.
    unexpected, unused: there and not wanted; `unused` are heads that this class does without.
    misshapen: name in the file -> (its shape, the shape wanted).
    copies: tensors of the file that are tied to another one and not read -> that other one.
    """

    names: dict[str, str]
    missing: list[str]
    fresh: list[str]
    unexpected: list[str]
    unused: list[str]
    misshapen: dict[str, tuple[Shape, Shape]]
    copies: dict[str, str]

    def info(self) -> dict[str, list[Any]]:
        """As transformers' output_loading_info says it."""
        shapes = [(name, *shapes) for name, shapes in self.misshapen.items()]
        missing, unexpected = [*self.missing, *self.fresh], [*self.unexpected, *self.unused]
        return {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": shapes, "error_msgs": []}

    def refuse(self, where: object, model: str) -> None:
        """CheckpointError that names everything missing, unexpected or misshapen; `where` the tensors are."""
        said = [f"{name} has shape {found}, expected {wanted}" for name, (found, wanted) in self.misshapen.items()]
        said = [*said[:4], *([f"{len(said) - 4} more have other shapes"] if said[4:] else [])]
        if self.missing:
            said.append(f"it lacks {listed(self.missing)}")
        if self.unexpected:
            said.append(f"it holds {listed(self.unexpected)}, for which there is no place")
        if said:
            raise CheckpointError(
                f"{where} does not fit {model} with this configuration: {'; '.join(said)}. Is the config.json that of "
                "another model? Otherwise download or save the checkpoint again."
            )

    def warn(self, where: object, model: str, stacklevel: int) -> None:
        """Say which heads the file lacks or holds for nothing."""
        if self.unused:
            warnings.warn(f"{where}: {listed(self.unused)} not used by {model}.", stacklevel=stacklevel + 1)
        if self.fresh:
            warnings.warn(
                f"{listed(self.fresh)} not in the checkpoint: freshly initialised. Train {model} before use.",
                stacklevel=stacklevel + 1,
            )


def differences(
    wanted: Mapping[str, Shape],
    held: Mapping[str, Shape],
    tied: Mapping[str, str],
    *,
    heads: bool = True,
    ignore_mismatched: bool = False,
) -> Differences:
    """Compare what a model wants with what a file holds, name -> shape each.

    Tables that every model computes are none, nor are keys of layers that read those of others.

    tied: names that the model does not store -> the wanted ones that they share. heads: those may be absent or left
    over, because another class of the family wrote the file; ignore_mismatched: and be of another shape, to start anew.
    """

    def free(name: str) -> bool:
        return heads and name.startswith(HEADS)

    names = stored_names(wanted, held)
    other = {k: (tuple(held[k]), tuple(wanted[n])) for n, k in names.items() if tuple(held[k]) != tuple(wanted[n])}
    misshapen = {key: shapes for key, shapes in other.items() if not (ignore_mismatched and free(key))}
    read = {name: key for name, key in names.items() if key not in other or key in misshapen}
    absent = [name for name in wanted if name not in read]
    used = {*names.values(), *tied}
    without_keys = {name.removesuffix(_QUERY) for name in wanted if name.endswith(_QUERY)}
    without_keys -= {name.removesuffix(_KEY) for name in wanted if name.endswith(_KEY)}

    def never_read(name: str) -> bool:
        owner = name.partition(".self_attn.")[0]
        return name.endswith(COMPUTED) or bool(
            name.endswith(_KEYS) and {owner, PREFIX + owner, owner.removeprefix(PREFIX)} & without_keys
        )

    extra = [name for name in held if name not in used and not never_read(name)]
    return Differences(
        names=read,
        missing=[name for name in absent if not free(name)],
        fresh=[name for name in absent if free(name)],
        unexpected=[name for name in extra if not free(name)],
        unused=[name for name in extra if free(name)],
        misshapen=misshapen,
        copies={
            name: names[source] for name, source in tied.items() if name in held and names.get(source, name) != name
        },
    )


def stored_names(wanted: Iterable[str], held: Iterable[str]) -> dict[str, str]:
    """Wanted name -> its name in the file, where it is there; base models and headed ones open each other's files.

    The embedding may be there under the name of the head that it is tied to: what stores shared memory once chooses.
    """
    wanted, held = list(wanted), set(held)
    headed_model, headed_file = (any(name.startswith(PREFIX) for name in names) for names in (wanted, held))

    def spelled(name: str) -> str:
        if headed_file:
            return name if headed_model else PREFIX + name
        return name.removeprefix(PREFIX)

    found = {name: spelled(name) for name in wanted if spelled(name) in held}
    for name in wanted:
        if name.removeprefix(PREFIX) == EMBEDDING and name not in found and HEAD in held and HEAD not in wanted:
            found[name] = HEAD
    return found


def tied_names(config: GemmaConfig, architecture: str) -> dict[str, str]:
    """Name that is not stored -> the one it shares memory with."""
    return {HEAD: PREFIX + EMBEDDING} if config.tie_word_embeddings and _role(architecture) == CAUSAL else {}


def warn_of_copies(checkpoint: Checkpoint, copies: Mapping[str, str], stacklevel: int, framework: str = "pt") -> None:
    """Say so where a stored tensor is not what the one is that it is tied to; only that other one is used."""
    for copy, source in copies.items():
        if not checkpoint.equal(copy, source, framework):
            warnings.warn(
                f"{checkpoint.where}: {copy} differs from {source}, but the configuration ties them; {source} is used. "
                "Keep both with tie_word_embeddings=False, an argument of from_pretrained or in config.json.",
                stacklevel=stacklevel + 1,
            )


def listed(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more tensors"


def released_size(shapes: Mapping[str, Shape]) -> str | None:
    """ "2b", "gemma3-4b": the released size of which this is by its norms and the width of its embedding.

    Whether the rest fits is `differences`' to say.
    """
    width = shapes.get(PREFIX + EMBEDDING, ())[-1:]
    member = _member(shapes)
    sizes = [size for size, preset in PRESETS.items() if preset["model_type"] == member]
    return next((size for size in sizes if width == (GemmaConfig.preset(size).hidden_size,)), None)


def _member(shapes: Mapping[str, Shape]) -> str:
    """The model_type, by the norms of the first layer, and whether it has a scalar."""
    layer = f"{PREFIX}layers.0."
    held = {name.removeprefix(layer) for name in shapes if name.startswith(layer)}
    found = {name for name in held - PER_LAYER.keys() if name.endswith("norm.weight") or name == SCALAR}

    def own(kind: Kind) -> set[str]:
        return {*_norms(kind), *_head_norms(kind), *([SCALAR] if kind.layer_scalar else [])}

    return next((name for name, kind in KINDS.items() if found == own(kind)), "gemma")


def _norms(kind: Kind) -> list[str]:
    return [f"{name}.weight" for name in kind.norms if name]


def _head_norms(kind: Kind) -> list[str]:
    return [f"self_attn.{part}_norm.weight" for part in "qk" if getattr(kind, f"{part}_norm")]


def config_from_shapes(shapes: Mapping[str, Shape], where: str) -> GemmaConfig:
    """The configuration of a checkpoint that came without one: a released model's, as shapes do not tell N from H.

    Raises CheckpointError for any other model.
    """
    size = released_size(shapes)
    if size is not None:
        classes = kind_of(PRESETS[size]["model_type"]).classes
        rows = shapes[PREFIX + EMBEDDING][0]
        return GemmaConfig.preset(size, vocab_size=rows, architectures=[classes["causal_lm"]])
    embedding = "x".join(map(str, shapes.get(PREFIX + EMBEDDING, ()))) or "no"
    raise CheckpointError(
        f"{where} comes without a config.json, and with {embedding} embedding it is no released Gemma. "
        "Put the model's config.json beside it, or name one: --config FILE."
    )
