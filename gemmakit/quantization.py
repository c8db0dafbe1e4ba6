"""How weights are to be quantized: data, read and written as config.json's `quantization_config`. Needs no torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from gemmakit.checks import FLAG, OneOf, Real, check, check_fields
from gemmakit.dtypes import dtype_name
from gemmakit.errors import ConfigError
from gemmakit.files import write_text

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
STORAGE_DTYPES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
QUANT_TYPES = ("fp4", "nf4")
BITS, GROUP_SIZES = (4, 5, 6, 8), (32, 128)
_EMBEDDING, _HEAD, _CLASSIFIER = "embed_tokens", "lm_head", "score"
_TABLE = "embed_tokens_per_layer"  # read by row, as an embedding that is not also the head
ROUTER = "router.proj"  # chooses experts: a wrong choice costs more than its few bits save


# What one weight may be stored in, 4.19 to 8.5 bits each: its codes, and the inputs that share a scale (None: a row).
FORMATS: dict[str, tuple[int, int | None]] = {
    "int4-g128": (4, 128),
    "int4-g32": (4, 32),
    "int5-g32": (5, 32),
    "int6-g32": (6, 32),
    "int8": (8, None),
    "int8-g32": (8, 32),
}


class _ModuleNames:
    """Modules by name: what `named` reads."""

    def holds(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(n, str) and n and _compiles(n) for n in value)

    def __str__(self) -> str:
        return "a list of module names or regular expressions"


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


MODULES = _ModuleNames()


class _ModulesByFormat:
    """Which modules have a format of their own."""

    def holds(self, value: Any) -> bool:
        return isinstance(value, dict) and all(k in FORMATS and MODULES.holds(names) for k, names in value.items())

    def __str__(self) -> str:
        return f"a dictionary of {', '.join(map(repr, FORMATS))}, each with {MODULES}"


MODULES_BY_FORMAT = _ModulesByFormat()


@dataclass
class BitsAndBytesConfig:
    """Quantization by the bitsandbytes package: 4 bits in blocks, or 8 bits in rows (LLM.int8()).

    Args:
        load_in_8bit, load_in_4bit: which of the two; one must be true to quantize.
        llm_int8_threshold: 8 bits; input features with a value above it are multiplied in 16 bits; 0 for none.
        llm_int8_skip_modules: modules to keep as they are, 4 bits too: the end of a name ("q_proj"), its beginning up
            to a dot ("model.layers.0"), or a regular expression for the beginning. The head is always kept.
        llm_int8_enable_fp32_cpu_offload: for a device_map of modules to devices; those on "cpu" or "disk" are kept.
        llm_int8_has_fp16_weight: 8 bits; keep 16-bit weights and quantize them in each call.
        bnb_4bit_compute_dtype: dtype of the multiplications, "float32" by default; a torch dtype or its name.
        bnb_4bit_quant_type: "fp4", or "nf4", whose values suit normally distributed weights.
        bnb_4bit_use_double_quant: quantize the blocks' scales too: about 0.4 bit a weight less.
        bnb_4bit_quant_storage: dtype of the tensors that hold the packed bits, "uint8" by default.

    Dtypes are kept by name. Keys of a file that mean nothing here are kept in `extra` and written back.

    Raises:
        ConfigError: a value is impossible; names the field, the value and the limit.
    """

    load_in_8bit: Annotated[bool, FLAG] = False
    load_in_4bit: Annotated[bool, FLAG] = False
    llm_int8_threshold: Annotated[float, Real(0)] = 6.0
    llm_int8_skip_modules: Annotated[list[str] | None, MODULES] = None
    llm_int8_enable_fp32_cpu_offload: Annotated[bool, FLAG] = False
    llm_int8_has_fp16_weight: Annotated[bool, FLAG] = False
    bnb_4bit_compute_dtype: Annotated[Any, OneOf(*COMPUTE_DTYPES)] = None
    bnb_4bit_quant_type: Annotated[str, OneOf(*QUANT_TYPES)] = "fp4"
    bnb_4bit_use_double_quant: Annotated[bool, FLAG] = False
    bnb_4bit_quant_storage: Annotated[Any, OneOf(*STORAGE_DTYPES)] = None
    extra: dict[str, Any] = field(default_factory=dict)

    quant_method = "bitsandbytes"  # not annotated: the same for every instance

    def __post_init__(self) -> None:
        compute, storage = self.bnb_4bit_compute_dtype, self.bnb_4bit_quant_storage
        self.bnb_4bit_compute_dtype = dtype_name("float32" if compute is None else compute)
        self.bnb_4bit_quant_storage = dtype_name("uint8" if storage is None else storage)
        self.validate()

    def validate(self) -> None:
        """Refuse what bitsandbytes cannot do. Raises ConfigError."""
        check_fields(self, ConfigError)
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit are both true: set one of them.")

    @property
    def is_quantizable(self) -> bool:
        """Whether this asks for anything."""
        return self.load_in_4bit or self.load_in_8bit

    def keeps(self, module: str) -> bool:
        """Whether `llm_int8_skip_modules` names this module."""
        return named(module, self.llm_int8_skip_modules)

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` of config.json, in the layout of transformers."""
        out = copy.deepcopy(self.extra) | {name: copy.deepcopy(getattr(self, name)) for name in _DEFAULTS}
        # transformers writes both spellings; it reads the plain ones.
        out |= {"_load_in_4bit": self.load_in_4bit, "_load_in_8bit": self.load_in_8bit}
        return out | {"quant_method": self.quant_method}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> BitsAndBytesConfig:
        """From what `to_dict` or transformers wrote. Raises ConfigError, for another method's settings too."""
        values = config_dict
        if not isinstance(values, dict):
            raise ConfigError(f"quantization_config is {values!r}; it must be a BitsAndBytesConfig or its dictionary.")
        method = values.get("quant_method", cls.quant_method)
        if method != cls.quant_method:
            raise ConfigError(f"quant_method is {method!r}; gemmakit reads weights that {cls.quant_method} quantized.")
        known = {name: copy.deepcopy(values[name]) for name in _DEFAULTS if name in values}
        written = {*_DEFAULTS, "quant_method", "_load_in_4bit", "_load_in_8bit"}
        return cls(**known, extra={k: copy.deepcopy(v) for k, v in values.items() if k not in written})

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict` as indented JSON, with sorted keys and a line end; use_diff is accepted."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write that as one file, which a reader finds whole."""
        write_text(Path(json_file_path), self.to_json_string())


@dataclass
class WeightOnlyConfig:
    """Weights in 4 to 8 bits beside a scale, multiplied by gemmakit's own kernels; activations keep their dtype.

    w[o, i] = scale * (code - zero): 8 bits with a scale a row, fewer with a scale a group of inputs, 4 with a zero too.

    Args:
        bits: 8, 6, 5 or 4, of the projections.
        group_size: inputs that share a scale: 32 or 128. By default 32; with 8 bits None, a scale a row.
        head_bits: of the embedding and the head, which are one matrix if the model ties them: 8, 6, 5, 4, or None,
            which keeps their dtype.
        modules_to_not_convert: modules to keep as they are: the end of a name ("q_proj"), its beginning up to a dot
            ("model.layers.0"), or a regular expression for the beginning. Classification heads are always kept.
        calibration: how the codes were chosen: None, each weight by itself, or "gptq", by their effect on a text.
            Written by `quantize_checkpoint`, which takes the text.
        head_group_size: of a head in 8 bits beside projections in fewer: None, a scale a row, or 32, as in GGUF files.
        module_formats: modules with another format than bits and head_bits say, by its short name: {"int8":
            ["o_proj"]}. Named as in modules_to_not_convert, which goes first; an unnamed head has its embedding's.
        activation_bits: to how many bits a product of more than 8 rows may round its input where the processor is fast
            at products of bytes: 8, or 16, which writes the weights out instead. With gradients nothing is rounded.
        decode_activation_bits: the same of up to 8 rows against codes of 4 bits, which decoding is: 16, which rounds
            less than bfloat16 does, or 8, which is faster where decoding waits for arithmetic. On the CPU.

    Keys of a file that mean nothing here are kept in `extra` and written back.

    Raises:
        ConfigError: a value is impossible; names the field, the value and the limit.
    """

    bits: Annotated[int, OneOf(*BITS)] = 8
    group_size: Annotated[int | None, OneOf(*GROUP_SIZES)] = None
    head_bits: Annotated[int | None, OneOf(*BITS, None)] = 8
    modules_to_not_convert: Annotated[list[str] | None, MODULES] = None
    calibration: Annotated[str | None, OneOf(None, "gptq")] = None
    head_group_size: Annotated[int | None, OneOf(None, *GROUP_SIZES)] = None
    module_formats: Annotated[dict[str, list[str]] | None, MODULES_BY_FORMAT] = None
    activation_bits: Annotated[int, OneOf(8, 16)] = 8
    decode_activation_bits: Annotated[int, OneOf(8, 16)] = 16
    extra: dict[str, Any] = field(default_factory=dict)

    quant_method = "gemmakit"  # not annotated: the same for every instance

    def __post_init__(self) -> None:
        if self.bits in (4, 5, 6) and self.group_size is None:
            self.group_size = GROUP_SIZES[0]
        self.validate()

    def validate(self) -> None:
        """Refuse what there is no layout for. Raises ConfigError."""
        check_fields(self, ConfigError)
        if self.decode_activation_bits < self.activation_bits:
            raise ConfigError(
                "decode_activation_bits is 8 and activation_bits 16: rounding the steps of decoding alone is not "
                "offered; leave activation_bits at 8."
            )

    def layout(self, head: bool) -> tuple[int, int | None] | None:
        """(bits, group size or None for a row) of the head and embedding, or of the projections; None: kept."""
        if not head or self.head_bits == self.bits:
            return self.bits, self.group_size
        if self.head_bits is None:
            return None
        return self.head_bits, GROUP_SIZES[0] if self.head_bits < 8 else self.head_group_size

    def layout_of(self, module: str, tied: bool) -> tuple[int, int | None] | None:
        """The same of the module of this name; tied: the head is the embedding's weight."""
        last = module.rpartition(".")[2]
        if last == _CLASSIFIER or module.endswith(ROUTER) or self.keeps(module):
            return None
        if last in (_EMBEDDING, _HEAD) and tied and any(map(self.keeps, (_EMBEDDING, f"model.{_EMBEDDING}", _HEAD))):
            return None  # they are one matrix
        own = None if last == _HEAD and tied else self._own_layout(module)
        if own is None and last == _HEAD:
            own = self._own_layout(f"model.{_EMBEDDING}")
        return own or self.layout(head=last in (_EMBEDDING, _HEAD, _TABLE))

    def _own_layout(self, module: str) -> tuple[int, int | None] | None:
        """What `module_formats` says of this module. Raises ConfigError if it says two things."""
        found = [kind for kind, modules in (self.module_formats or {}).items() if named(module, modules)]
        if len(found) > 1:
            raise ConfigError(f"module_formats gives {module} as {' and as '.join(found)}: name it once.")
        return FORMATS[found[0]] if found else None

    def keeps(self, module: str) -> bool:
        """Whether `modules_to_not_convert` names this module."""
        return named(module, self.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        own = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "extra"}
        return copy.deepcopy(self.extra) | own | {"quant_method": self.quant_method}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> WeightOnlyConfig:
        """From what `to_dict` wrote. Raises ConfigError, for another method's settings too."""
        values = config_dict
        if not isinstance(values, dict):
            raise ConfigError(f"quantization_config is {values!r}; it must be a WeightOnlyConfig or its dictionary.")
        if values.get("quant_method", cls.quant_method) != cls.quant_method:
            raise ConfigError(
                f"quant_method is {values['quant_method']!r}; a WeightOnlyConfig is {cls.quant_method!r}."
            )
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {name: copy.deepcopy(values[name]) for name in names if name in values}
        extra = {k: copy.deepcopy(v) for k, v in values.items() if k not in {*names, "quant_method"}}
        return cls(**known, extra=extra)

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict` as indented JSON, with sorted keys and a line end; use_diff is accepted."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write that as one file, which a reader finds whole."""
        write_text(Path(json_file_path), self.to_json_string())


def stored_parts(O: int, I: int, bits: int, group_size: int | None) -> dict[str, tuple[str, tuple[int, int]]]:
    """What a weight (O, I) of gemmakit's own scheme is stored as: end of the tensor's name -> dtype and shape.

    Codes of fewer bits lie in whole blocks, of 32 inputs in 4 bits, of 128 in 5 and 6: each row is filled up.
    """
    groups = (O, 1 if group_size is None else -(-I // group_size))
    block = 32 if bits == 4 else 128
    codes = ("int8", (O, I)) if bits == 8 else ("uint8", (O, block * bits // 8 * -(-I // block)))
    scale = ("float32" if group_size is None else "float16", groups)
    return {"": codes, "_scale": scale, **({"_zero": ("uint8", groups)} if bits == 4 else {})}


# What may be written instead of a configuration.
SHORT_NAMES: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int6": {"bits": 6, "head_bits": 6},
    "int5": {"bits": 5, "head_bits": 5},
    "int4": {"bits": 4},
    "int4-g32": {"bits": 4, "group_size": 32},
    "int4-g128": {"bits": 4, "group_size": 128},
    "int4-a8": {"bits": 4, "decode_activation_bits": 8},
    "int4-g128-a8": {"bits": 4, "group_size": 128, "decode_activation_bits": 8},
}


def parse_quantization(value: Any) -> BitsAndBytesConfig | WeightOnlyConfig:
    """A copy of a configuration, whether it is ours, a dictionary, a short name ("int4"), or has `to_dict`.

    A dictionary without quant_method is a WeightOnlyConfig's if it has `bits`. Raises ConfigError for other methods.
    """
    if isinstance(value, str):
        check("quantization_config", value, OneOf(*SHORT_NAMES), ConfigError)
        return WeightOnlyConfig(**SHORT_NAMES[value])
    to_dict = getattr(value, "to_dict", None)
    values = value if to_dict is None else to_dict()
    if not isinstance(values, dict):
        raise ConfigError(
            f"quantization_config is {value!r}; it must be a WeightOnlyConfig, a BitsAndBytesConfig, the dictionary of "
            f"one, or one of {', '.join(map(repr, SHORT_NAMES))}."
        )
    method = values.get("quant_method", "gemmakit" if "bits" in values else "bitsandbytes")
    if method not in ("gemmakit", "bitsandbytes"):
        raise ConfigError(
            f"quant_method is {method!r}; gemmakit reads weights that bitsandbytes or gemmakit itself quantized."
        )
    return (WeightOnlyConfig if method == "gemmakit" else BitsAndBytesConfig).from_dict(values)


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(BitsAndBytesConfig) if f.name != "extra"}


def named(module: str, names: list[str] | None) -> bool:
    """Whether one of `names` is the module's end, its beginning up to a dot, or a regular expression for that."""
    return any(
        module.endswith(name) or re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", module) is not None
        for name in names or ()
    )
