"""What a Gemma is made of: sizes, constants, rotary settings. Data only; neither torch nor jax is needed to read it."""

from __future__ import annotations

import copy
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from gemmakit.checks import FLAG, Real, Whole, check, check_fields
from gemmakit.config_files import ConfigFiles
from gemmakit.dtypes import dtype_name
from gemmakit.errors import CheckpointError, ConfigError
from gemmakit.family import (
    FULL_ATTENTION,
    OPTIONAL,
    PRESETS,
    SLIDING_ATTENTION,
    Kind,
    kind_of,
    member_class,
    members,
    set_layer_types,
    text_part,
)
from gemmakit.files import read_json_object
from gemmakit.gguf import read_gguf_header
from gemmakit.gguf_settings import config_values
from gemmakit.hub import HubOptions, find_file, find_gguf
from gemmakit.layer_spec import LayerSpec, check_layers, head_dim, kept_heads, kv_heads, layer_spec, pruned_heads
from gemmakit.rotary import changed_ropes, check_rope, merged_rope, merged_ropes, refuse_local, without_theta
from gemmakit.spellings import Spelling, refuse_misspelled

# "gelu" is absent on purpose: in Gemma configurations it means the tanh form (see _activation).
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_erf", "relu", "silu")

T = TypeVar("T")
_WIDTH = Whole(1, 2**24)
_HEADS = Whole(1, 2**16)
_ABOVE_ZERO = Real(0.0, above=True)


def _keeps_unknown(cls: type[T]) -> type[T]:
    """Keywords that are no fields go to `extra`, unless they look like one; a member's own defaults come first."""
    plain = cls.__init__

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **values: Any) -> None:
        if values.pop("model_type", self.model_type) != self.model_type:
            raise ConfigError(f"{cls.__name__} is not made with another model_type: use GemmaConfig.from_dict.")
        values = {**self.kind.defaults, **dict(zip(_FIELDS, args, strict=False)), **values}
        unknown = {name: values.pop(name) for name in [*values] if name not in _FIELDS}
        refuse_misspelled(unknown, _FIELDS)
        plain(self, **values)
        self.extra = copy.deepcopy(unknown)

    cls.__init__ = init
    return cls


@_keeps_unknown
@dataclass(eq=False, repr=False)
class GemmaConfig(ConfigFiles):
    """The settings of a Gemma model; the defaults are those of Gemma 7B, in the other members' classes their own.

    Args:
        vocab_size: number of token ids (V).
        hidden_size: width of the residual stream (D).
        intermediate_size: width of the gated MLP (F).
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads (N).
        num_key_value_heads: key and value heads (K), a divisor of N; 1 is multi-query. `None` means N.
        head_dim: width of one head (H), even. N * H need not equal D. `None` means D // N.
        hidden_act: MLP activation, one of `ACTIVATIONS` or a callable on tensors. `"gelu"`, a legacy value of the
            released files, means `"gelu_pytorch_tanh"`, with which Gemma was trained; `"gelu_erf"` asks for the exact
            error-function form. `hidden_activation`, the key of later releases, wins when given.
        max_position_embeddings: longest context, in tokens.
        initializer_range: standard deviation of fresh weights.
        rms_norm_eps: added to the mean square in RMSNorm.
        use_cache: whether forward returns `past_key_values` unless told otherwise.
        pad_token_id, eos_token_id, bos_token_id: special ids; eos may be a list.
        tie_word_embeddings: whether the head shares the embedding's weight.
        rope_theta: base of the rotary frequencies; the same number as `rope_parameters["rope_theta"]`.
        attention_bias: whether q, k, v and o projections carry a bias.
        attention_dropout: dropout on attention probabilities in training, in [0, 1).
        rope_parameters: `{"rope_type": ..., "rope_theta": ..., ...}` with a type of `gemmakit.rotary.ROPE_TYPES`.
            Gemma 3's holds one such dictionary a kind of layer: {"sliding_attention": ..., "full_attention": ...}.
        rope_scaling: the older spelling of the same without theta (`{"type": ..., "factor": ...}`), of full layers.
        rope_local_base_freq: the older name of window layers' base.
        use_bidirectional_attention: every token sees every non-padding token; Gemma 4's files say "all" for that, and
            "vision" for tokens of an image alone, of which text has none.
        query_pre_attn_scalar: attention scores are multiplied by this to the -1/2; None for head_dim.
        sliding_window: keys that a query of a window layer sees, itself included.
        layer_types: what each layer attends to, "sliding_attention" or "full_attention".
        attn_logit_softcapping, final_logit_softcapping: scores and logits are capped, cap * tanh(x / cap).
        global_head_dim, num_global_key_value_heads: of full layers, where they differ; the heads only where values are
            keys. Files that say it of single layers (`per_layer_config`) are read too.
        attention_k_eq_v: in full layers one projection gives keys and values.
        num_kv_shared_layers: so many of the last layers read the keys and values of an earlier one.
        use_double_wide_mlp: those layers' MLP is twice as wide.
        enable_moe_block: beside each MLP stand num_experts smaller ones, moe_intermediate_size wide, of which a token
            takes top_k_experts.
        hidden_size_per_layer_input, vocab_size_per_layer_input: width and ids of the embedding that every layer has of
            its own; 0 wide for none.
        pruned_heads: {layer: query heads that are gone}, in the numbers of the whole model; gives a saved pruned model
            its shapes.
        num_labels, id2label, label2id, problem_type, classifier_dropout: for the classification heads.
        dtype: dtype name of the stored weights (`torch_dtype`, the older key, is read too).

    Keys of a checkpoint's config.json that gemmakit does not know are kept (and can be read as attributes), are never
    executed, and are written back.

    Raises:
        ConfigError: a value is impossible; names the field, the value and the limit.
    """

    vocab_size: Annotated[int, Whole(1, 2**31 - 1)] = 256000
    hidden_size: Annotated[int, _WIDTH] = 3072
    intermediate_size: Annotated[int, _WIDTH] = 24576
    num_hidden_layers: Annotated[int, Whole(1, 1000)] = 28
    num_attention_heads: Annotated[int, _HEADS] = 16
    num_key_value_heads: Annotated[int, _HEADS] = 16
    head_dim: Annotated[int, _HEADS] = 256
    hidden_act: str | Callable[[Any], Any] = "gelu_pytorch_tanh"
    max_position_embeddings: Annotated[int, Whole(1, 2**40)] = 8192
    initializer_range: Annotated[float, Real(0.0)] = 0.02
    rms_norm_eps: Annotated[float, Real(0.0)] = 1e-6
    use_cache: Annotated[bool, FLAG] = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: Annotated[bool, FLAG] = True
    rope_theta: Spelling[float] = Spelling(
        lambda c: c.rope(FULL_ATTENTION)["rope_theta"],
        lambda c, value: c._with_rope(FULL_ATTENTION, {**c.rope(FULL_ATTENTION), "rope_theta": value}),
    )
    attention_bias: Annotated[bool, FLAG] = False
    attention_dropout: Annotated[float, Real(0.0, 1.0, below=True)] = 0.0
    _: KW_ONLY
    rope_parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    rope_scaling: Spelling[dict[str, Any] | None] = Spelling(
        lambda c: without_theta(c.rope(FULL_ATTENTION)),
        lambda c, value: c._with_rope(FULL_ATTENTION, merged_rope(c.rope_theta, None, value)),
    )
    rope_local_base_freq: Spelling[float | None] = Spelling(
        lambda c: c.rope(SLIDING_ATTENTION)["rope_theta"] if c.kind.ropes else None,
        lambda c, value: c._with_rope(SLIDING_ATTENTION, {**c.rope(SLIDING_ATTENTION), "rope_theta": value}),
    )
    hidden_activation: Spelling[str | Callable[[Any], Any]] = Spelling(
        lambda c: c.hidden_act, lambda c, value: {"hidden_act": _activation(value)}
    )
    use_bidirectional_attention: bool | str | None = None
    query_pre_attn_scalar: Annotated[float | None, _ABOVE_ZERO] = None
    sliding_window: Annotated[int | None, Whole(1)] = None
    layer_types: list[str] | None = None
    attn_logit_softcapping: Annotated[float | None, _ABOVE_ZERO] = None
    final_logit_softcapping: Annotated[float | None, _ABOVE_ZERO] = None
    global_head_dim: Annotated[int | None, _HEADS] = None
    num_global_key_value_heads: Annotated[int | None, _HEADS] = None
    attention_k_eq_v: Annotated[bool | None, FLAG] = None
    num_kv_shared_layers: Annotated[int | None, Whole(0)] = None
    use_double_wide_mlp: Annotated[bool | None, FLAG] = None
    enable_moe_block: Annotated[bool | None, FLAG] = None
    num_experts: Annotated[int | None, Whole(1, 2**16)] = None
    top_k_experts: Annotated[int | None, Whole(1, 2**16)] = None
    moe_intermediate_size: Annotated[int | None, _WIDTH] = None
    hidden_size_per_layer_input: Annotated[int | None, Whole(0, 2**16)] = None
    vocab_size_per_layer_input: Annotated[int | None, Whole(1, 2**31 - 1)] = None
    pruned_heads: dict[int, list[int]] = field(default_factory=dict[int, "list[int]"])
    num_labels: Spelling[int] = Spelling(lambda c: len(c.id2label), lambda c, value: _labels(value, {}, {}))
    id2label: dict[int, str] = field(default_factory=dict[int, str])
    label2id: dict[str, int] = field(default_factory=dict[str, int])
    problem_type: str | None = None
    classifier_dropout: float | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    attn_implementation: str = "sdpa"
    dtype: str | None = None
    torch_dtype: Spelling[str | None] = Spelling(
        lambda c: c.dtype, lambda c, value: {"dtype": value and dtype_name(value)}
    )
    architectures: list[str] | None = None
    name_or_path: str = field(default="", init=False)
    extra: dict[str, Any] = field(default_factory=dict[str, Any], init=False)

    model_type = "gemma"  # not annotated: a class's, not an instance's

    def __post_init__(self) -> None:
        given = {name: vars(self).pop(f"_{name}") for name in _SPELLINGS}
        for name, value in vars(self).items():
            if isinstance(value, dict | list):  # the caller's own stays as it is
                setattr(self, name, copy.deepcopy(value))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = _head_dim(self.hidden_size, self.num_attention_heads)
        activation = given["hidden_activation"]
        self.hidden_act = _activation(self.hidden_act if activation is None else activation)
        ropes = [given[name] for name in ("rope_theta", "rope_scaling", "rope_local_base_freq")]
        self.rope_parameters = merged_ropes(self.kind.ropes, self.rope_parameters, *ropes)
        if self.layer_types is None and "layer_types" in self.kind.defaults:
            self.layer_types = self.kind.layer_types(self.num_hidden_layers)
        self.pruned_heads = pruned_heads(self.pruned_heads)
        vars(self).update(_labels(given["num_labels"], self.id2label, self.label2id))
        self.attn_implementation = self.attn_implementation or "sdpa"
        dtype = given["torch_dtype"] if self.dtype is None else self.dtype
        self.dtype = None if dtype is None else dtype_name(dtype)
        self.validate()

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra and not name.startswith("__"):  # a file must not answer Python's own protocols
            return extra[name]
        public = name.lstrip("_")  # transformers keeps some fields under a private name
        hint = f". Its name here is {public!r}" if public in _FIELDS else ""
        raise AttributeError(f"GemmaConfig has no field {name!r}{hint}.")

    # -- derived ---------------------------------------------------------------------------------------------------

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence; empty when there is none."""
        if self.eos_token_id is None:
            return ()
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, (list, tuple)) else (self.eos_token_id,)

    # -- layers ----------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> Kind:
        """What this model_type says of every layer."""
        return kind_of(self.model_type)

    def layer(self, index: int) -> LayerSpec:
        """What layer `index`, counted from 0, is made of."""
        return layer_spec(self, index)

    def kv_layers(self) -> list[LayerSpec]:
        """The layers that keep keys and values, from the first; those that read another layer's come after them."""
        specs = map(self.layer, range(self.num_hidden_layers))
        return [spec for spec in specs if spec.kv_source is None]

    @property
    def is_causal(self) -> bool:
        """Whether a token sees none that comes after it. "vision" lets but the tokens of an image see each other."""
        return self.use_bidirectional_attention in (None, False, "vision")

    def cache_size(self, tokens: int) -> int:
        """How many numbers the keys and values are that a sequence of so many tokens is read by, all layers together.

        Of a window layer those in its window.
        """
        specs = self.kv_layers()
        seen = [tokens if spec.window is None else min(tokens, spec.window) for spec in specs]
        return sum(2 * s.num_key_value_heads * s.head_dim * n for s, n in zip(specs, seen, strict=True))

    def heads(self, layer: int, gone: Iterable[int] | None = None) -> tuple[list[int], list[int]]:
        """The query and the kv heads of a layer, in the numbers of the whole model.

        gone: the query heads without which; those of `pruned_heads` by default. Raises ConfigError, see `kept_heads`.
        """
        gone = set(self.pruned_heads.get(layer, ()) if gone is None else gone)
        if not 0 <= layer < self.num_hidden_layers:
            raise ConfigError(f"layer {layer} does not exist: there are {self.num_hidden_layers}, counted from 0.")
        return kept_heads(layer, self.num_attention_heads, kv_heads(self, layer), gone)

    def rope(self, name: str) -> dict[str, Any]:
        """The settings of the rotary table that a `LayerSpec.rope` names."""
        return self.rope_parameters[name] if self.kind.ropes else self.rope_parameters

    def rotary_dim(self, name: str) -> int:
        """Width of the heads that the rotary table of that name turns."""
        return head_dim(self, name)

    def _with_rope(self, name: str, rope: dict[str, Any]) -> dict[str, Any]:
        """The field rope_parameters with another table of that name."""
        if name == SLIDING_ATTENTION and not self.kind.ropes:
            refuse_local(rope["rope_theta"])
        return {"rope_parameters": {**self.rope_parameters, name: rope} if self.kind.ropes else rope}

    # -- validation ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Refuse what no model can be built from. Raises ConfigError."""
        check_fields(self, ConfigError)
        for name in ("num_key_value_heads", "num_global_key_value_heads"):
            if self.num_attention_heads % (getattr(self, name) or 1):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, which does not divide num_attention_heads = "
                    f"{self.num_attention_heads}: every key/value head must serve the same number of query heads."
                )
        for name in ("head_dim", "global_head_dim"):
            if (width := getattr(self, name) or 0) % 2:
                raise ConfigError(f"{name} is {width}; rotary embeddings rotate halves, so it must be even.")
        for name in ("pad_token_id", "bos_token_id"):
            self._check_token(name, getattr(self, name))
        for token in self.eos_token_ids:
            self._check_token("eos_token_id", token)
        for name in self.kind.ropes or (FULL_ATTENTION,):
            check_rope(self.rope(name), self.rotary_dim(name))
        check_layers(self)
        for layer in self.pruned_heads:
            self.heads(layer)

    def _check_token(self, name: str, token: int | None) -> None:
        # Released files hold -1 for "there is no such token".
        if token is not None and token != -1:
            check(name, token, Whole(0, self.vocab_size - 1), ConfigError)

    # -- in and out ------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GemmaConfig:
        """The configuration of a released size, of the class of its member: "2b", "gemma2-9b", "gemma3-270m", ..."""
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
        values = {**PRESETS[name], **overrides}
        model_type = values.pop("model_type")
        set_layer_types(kind_of(model_type), values, values.get("num_hidden_layers"))
        values.pop("sliding_window_pattern", None)
        return member_class(cls, model_type)(**values)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **overrides: Any) -> GemmaConfig:
        """Build from config.json's content, of the class that its `model_type` names.

        Of a checkpoint that reads images or sound too, the text part. Unknown keys are kept as data, whatever they are
        called.
        """
        refuse_misspelled(
            (k for k in overrides if k not in config_dict and k not in _FIELDS and not k.startswith("_")), _FIELDS
        )
        values = text_part(config_dict)
        model_type = values.pop("model_type", cls.model_type)
        kind = kind_of(model_type)
        cls = member_class(cls, model_type)
        values = _merged(kind, values, overrides)
        foreign = {k: values.pop(k) for k in OPTIONAL if k in values and k not in kind.defaults and k not in overrides}
        if "id2label" in values and "num_labels" not in overrides:
            values.pop("num_labels", None)
        elif "num_labels" in overrides:
            values.pop("id2label", None)
            values.pop("label2id", None)
        attention = values.pop("_attn_implementation", None)
        values.setdefault("attn_implementation", attention)
        name = values.pop("_name_or_path", "")
        unknown = foreign | {k: values.pop(k) for k in list(values) if k not in _FIELDS}
        config = cls(**values)
        config.extra.update(copy.deepcopy(unknown))
        config.name_or_path = name
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> GemmaConfig:
        """Read config.json of a folder, a file or a Hub id, or what a GGUF file says of its model.

        Args:
            pretrained_model_name_or_path: folder, path of a config.json or a .gguf file, or "owner/name" on the Hub.
            kwargs: revision, token, cache_dir, local_files_only, subfolder; gguf_file, the name of a GGUF file of that
                folder or id; everything else overrides a field.

        Raises:
            CheckpointError: no such file, or it is not a JSON object; a GGUF that is damaged or no Gemma.
            ConfigError: a value is impossible.
        """
        hub = HubOptions.take(kwargs)
        gguf = find_gguf(pretrained_model_name_or_path, kwargs.pop("gguf_file", None), hub)
        path = Path(pretrained_model_name_or_path)
        if gguf is None and not path.is_file():
            found = find_file(pretrained_model_name_or_path, "config.json", hub)
            assert found is not None
            path = found
        elif gguf is None and path.suffix != ".json":
            raise CheckpointError(
                f"{str(path)!r} is a file, not a config.json or a .gguf. Give the folder that holds the model, or make "
                "one of the file: gemmakit convert FILE FOLDER."
            )
        values = read_json_object(path) if gguf is None else config_values(read_gguf_header(gguf))
        config = cls.from_dict(values, **kwargs)
        config.name_or_path = str(gguf or pretrained_model_name_or_path)
        return config

    def to_dict(self) -> dict[str, Any]:
        """config.json's content: readable by gemmakit and by every transformers since 4.38."""
        out: dict[str, Any] = {**copy.deepcopy(self.extra), "model_type": self.model_type}
        for name in _STORED:
            value = getattr(self, name)
            if name in OPTIONAL and name not in self.kind.defaults:
                continue
            if value is not None or name in _NULLS:
                out[name] = copy.deepcopy(value)
        if callable(self.hidden_act):
            out["hidden_act"] = getattr(self.hidden_act, "__name__", repr(self.hidden_act))
        out["hidden_activation"] = out["hidden_act"]
        if self.kind.older_rope_keys:
            out |= {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}
            out |= {"rope_local_base_freq": self.rope_local_base_freq} if self.kind.ropes else {}
        if self.dtype is not None:
            out["torch_dtype"] = self.dtype
        if not self.pruned_heads:
            del out["pruned_heads"]
        if [*self.id2label.values()] == ["LABEL_0", "LABEL_1"]:
            del out["id2label"], out["label2id"]
        return out

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict` as indented JSON, with sorted keys and a line end; use_diff is accepted."""
        plain = lambda value: value.item() if hasattr(value, "item") else str(value)  # noqa: E731  a number of numpy
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=plain) + "\n"

    def update(self, values: dict[str, Any]) -> None:
        """Change fields in place. Raises ConfigError for an impossible value or a misspelt name."""
        refuse_misspelled((k for k in values if k not in _FIELDS and k not in self.extra), _FIELDS)
        for name, value in values.items():
            setattr(self, "hidden_activation" if name == "hidden_act" else name, value)
        self.validate()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GemmaConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"GemmaConfig {self.to_json_string()}"


_ROPE_SPELLINGS = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq")
# Written though they are None: what is not there is a reader's default.
_NULLS = ("pad_token_id", "eos_token_id", "bos_token_id", *OPTIONAL)

_FIELDS = [f.name for f in fields(GemmaConfig) if f.init]
_SPELLINGS = [name for name in _FIELDS if isinstance(vars(GemmaConfig).get(name), Spelling)]
# Of a call, not of the model: config.json does not hold them.
_OF_A_CALL = ("output_attentions", "output_hidden_states", "return_dict", "attn_implementation")
_STORED = [name for name in _FIELDS if name not in (*_SPELLINGS, *_OF_A_CALL)]

_warned_gelu = False


def _activation(name: str | Callable[[Any], Any]) -> str | Callable[[Any], Any]:
    global _warned_gelu
    if callable(name):
        return name
    if name == "gelu":
        if not _warned_gelu:
            warnings.warn(
                'hidden_act "gelu" is a legacy value of the released Gemma files; Gemma was trained with the tanh form,'
                ' so "gelu_pytorch_tanh" is used. Ask for the exact form with hidden_act="gelu_erf".',
                stacklevel=5,
            )
            _warned_gelu = True
        return "gelu_pytorch_tanh"
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act is {name!r}; it must be a callable or one of {', '.join(ACTIVATIONS)}.")
    return name


def _labels(num: int | None, id2label: dict[Any, str], label2id: dict[str, int]) -> dict[str, Any]:
    """The fields id2label and label2id, with the names LABEL_0, ... where there are none."""
    if num is not None:
        check("num_labels", num, Whole(1, 1 << 20), ConfigError)
    if not id2label:
        id2label = {i: f"LABEL_{i}" for i in range(2 if num is None else num)}
    try:
        names = {int(i): label for i, label in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(f"id2label is {id2label!r}; it must map whole numbers to names.") from None
    if num is not None and num != len(names):
        raise ConfigError(f"num_labels is {num}, but id2label names {len(names)} labels: give one of them.")
    return {"id2label": names, "label2id": label2id or {label: i for i, label in names.items()}}


def _head_dim(hidden_size: Any, heads: Any) -> int:
    whole = isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0
    return hidden_size // heads if whole else 1  # validate() names the field that is wrong


def _merged(kind: Kind, values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A file's values with those of a call over them, whatever spelling each uses for the same thing."""
    values = dict(values)
    old = merged_ropes(kind.ropes, *(values.pop(name, None) for name in _ROPE_SPELLINGS))
    # Said to be None, settings are the default ones; not said, the file's.
    none: dict[str, Any] = {key: {} for key in ("rope_parameters", "rope_scaling") & overrides.keys()}
    given = [none.get(name) if overrides.get(name) is None else overrides[name] for name in _ROPE_SPELLINGS]
    overrides = {k: v for k, v in overrides.items() if k not in _ROPE_SPELLINGS}
    for name, other in (("hidden_act", "hidden_activation"), ("torch_dtype", "dtype")):
        if name in overrides and other not in overrides:
            values.pop(other, None)
    set_layer_types(kind, values, {**kind.defaults, **values, **overrides}.get("num_hidden_layers"))
    return {**values, **overrides, "rope_parameters": changed_ropes(kind.ropes, old, *given)}


globals().update(members(GemmaConfig))
