"""4-bit (nf4, fp4) and 8-bit (LLM.int8()) linear layers of the bitsandbytes package, in transformers' file layout.

In a file, 4 bits: `weight`, `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4` (JSON text as
bytes), and with double quantization `weight.nested_absmax`, `weight.nested_quant_map`. 8 bits: `weight`, `SCB`,
`weight_format`.

Source: arXiv:2305.14314 (nf4, double quantization), arXiv:2208.07339 (LLM.int8()).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gemmakit.checkpoint import Checkpoint
from gemmakit.errors import InputError, MissingDependency
from gemmakit.pytorch.quantize.quantizer import PartNames, weight_error
from gemmakit.quantization import COMPUTE_DTYPES, QUANT_TYPES, BitsAndBytesConfig

_STATES = tuple(f"quant_state.bitsandbytes__{kind}" for kind in QUANT_TYPES)
_TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# What the text of a quant_state may hold; `shape` aside.
_NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")
_BLOCK_SIZES = tuple(2**n for n in range(5, 13))
_STATE_BYTES = 4096  # about 150 are used


class BitsAndBytesQuantizer:
    """A `Quantizer`. Holds settings only, so a model with one can be copied and pickled."""

    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)

    def __init__(
        self, config: BitsAndBytesConfig, heads: tuple[str, ...], kept: tuple[str, ...] = (), stored: bool = False
    ):
        """heads: prefixes of modules that stay; kept: names of more; stored: the file's weights are quantized."""
        self.config = config
        self.bits = 4 if config.load_in_4bit else 8
        self.heads = heads
        self.kept = kept
        self.stored = stored

    def require(self, device: torch.device) -> None:
        """Quantize and multiply once, in small: versions differ in what they can do on which device."""
        bnb = _package()
        try:
            weight = torch.eye(64, dtype=torch.float32, device="cpu")
            layer = self.from_float(nn.Linear(64, 64, bias=False, device="meta"), "", weight, device, None)
            with torch.no_grad():
                layer(torch.ones(1, 64, dtype=torch.float32, device=device))
        except Exception as e:  # an operator that is not there, a library that was not built, ...
            kind = f"{self.config.bnb_4bit_quant_type}" if self.bits == 4 else "int8"
            raise InputError(
                f"bitsandbytes {bnb.__version__} cannot run {kind} layers on {device}: {str(e).splitlines()[:1]}. "
                "Upgrade it (pip install -U bitsandbytes), or choose another device or quantization."
            ) from e

    def takes(self, name: str) -> bool:
        if self.stored and not self.config.llm_int8_has_fp16_weight:
            return False  # what the file holds plainly was kept on purpose
        if (name + ".").startswith(self.heads) or name.endswith("embed_tokens") or self.config.keeps(name):
            return False
        return not any((name + ".").startswith(place + ".") or not place for place in self.kept)

    def bits_of(self, name: str) -> float:
        return self.bits

    # -- in --------------------------------------------------------------------------------------------------------

    def parts(self, key: str, checkpoint: Checkpoint) -> PartNames:
        return (_parts_4bit if self.bits == 4 else _parts_8bit)(key, checkpoint)

    def shape(self, name: str, expected: tuple[int, ...], parts: PartNames, checkpoint: Checkpoint) -> tuple[int, ...]:
        return (_shape_4bit if self.bits == 4 else _shape_8bit)(parts, checkpoint)

    def from_float(
        self, module: nn.Module, name: str, weight: Tensor, device: torch.device, dtype: torch.dtype | None
    ) -> nn.Module:
        """weight: (O, I) on the CPU, cast to `dtype` and quantized on `device`."""
        bnb, layer = _package(), self._layer(module)
        weight = weight if dtype is None else weight.to(dtype)
        if self.bits == 8:
            fp16 = self.config.llm_int8_has_fp16_weight
            packed = bnb.nn.Int8Params(weight, requires_grad=fp16, has_fp16_weights=fp16)
        else:
            packed = bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                compress_statistics=self.config.bnb_4bit_use_double_quant,
                quant_type=self.config.bnb_4bit_quant_type,
                quant_storage=getattr(torch, self.config.bnb_4bit_quant_storage),
                module=layer,
            )
        layer.weight = packed.to(device)
        return layer

    def from_parts(
        self, module: nn.Module, name: str, tensors: Mapping[str, Tensor], device: torch.device
    ) -> nn.Module:
        bnb, layer = _package(), self._layer(module)
        if self.bits == 8:
            weight, scale = tensors["weight"].to(device), tensors["SCB"].to(device)
            # The layer takes the codes from CB; weight.data is the same memory.
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scale)
        else:
            statistics = {name: tensor for name, tensor in tensors.items() if name != "weight"}
            layer.weight = bnb.nn.Params4bit.from_prequantized(
                tensors["weight"], statistics, requires_grad=False, device=device, module=layer
            )
        return layer

    def _layer(self, linear: nn.Module) -> Any:
        """The empty layer of bitsandbytes of the linear layer's size."""
        bnb, config = _package(), self.config
        assert isinstance(linear, nn.Linear)
        size: dict[str, Any] = dict(bias=False, device="meta")
        if self.bits == 8:
            return bnb.nn.Linear8bitLt(
                linear.in_features,
                linear.out_features,
                has_fp16_weights=config.llm_int8_has_fp16_weight,
                threshold=config.llm_int8_threshold,
                **size,
            )
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            compute_dtype=getattr(torch, config.bnb_4bit_compute_dtype),
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=getattr(torch, config.bnb_4bit_quant_storage),
            **size,
        )
        # On processors with AVX512-BF16 an evaluation would repack the weight in place: bfloat16 whatever the compute
        # dtype, no gradient through it ever after, other scales on saving, and an error at sizes not divisible by 32.
        layer.support_avx512bf16_for_cpu = False
        return layer

    # -- out -------------------------------------------------------------------------------------------------------

    def dequantized(self, module: nn.Module) -> Tensor | None:
        bnb, layer = _package(), cast("Any", module)
        if isinstance(module, bnb.nn.Linear4bit):
            return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        if not isinstance(module, bnb.nn.Linear8bitLt):
            return None
        # The first call moves the codes from the weight into the layer's state.
        held = layer.weight if layer.state.CB is None else layer.state
        if held.SCB is None:
            return layer.weight.data.float()
        return held.CB.float() * held.SCB[:, None] / 127

    def to_dict(self) -> dict[str, Any]:
        """With the head among the skipped modules, if any are named: other readers keep it only by default."""
        out = self.config.to_dict()
        if out["llm_int8_skip_modules"] is not None:
            heads = [head.removesuffix(".") for head in self.heads]
            out["llm_int8_skip_modules"] = list(dict.fromkeys([*out["llm_int8_skip_modules"], *heads, *self.kept]))
        elif self.kept:
            out["llm_int8_skip_modules"] = [*(head.removesuffix(".") for head in self.heads), *self.kept]
        return out


def _package() -> Any:
    try:
        import bitsandbytes
    except ImportError as e:
        raise MissingDependency(
            "BitsAndBytesConfig needs the bitsandbytes package: pip install 'gemmakit[quantization]'."
        ) from e
    return bitsandbytes


# -- the stored tensors, checked before native code reads them ---------------------------------------------------------


def _parts_4bit(key: str, checkpoint: Checkpoint) -> PartNames:
    """Whatever is there: `_shape_4bit` says what lacks."""
    found = {part: f"{key}.{part}" for part in (*_TABLES, *_STATES) if f"{key}.{part}" in checkpoint}
    return {"weight": key, **found} if found or checkpoint.info(key).dtype == "uint8" else {}


def _parts_8bit(key: str, checkpoint: Checkpoint) -> PartNames:
    owner = key.removesuffix("weight")
    found = {part: owner + part for part in ("SCB", "weight_format") if owner + part in checkpoint}
    return {"weight": key, **found} if found or checkpoint.info(key).dtype == "int8" else {}


def _shape_8bit(parts: PartNames, checkpoint: Checkpoint) -> tuple[int, ...]:
    _require(parts, ("weight", "SCB"), checkpoint)
    weight, scale = (checkpoint.info(parts[name]) for name in ("weight", "SCB"))
    if weight.dtype != "int8" or len(weight.shape) != 2:
        raise weight_error(parts, checkpoint, f"is {weight.dtype} of shape {weight.shape}, not an int8 matrix")
    if scale.dtype != "float32" or tuple(scale.shape) != tuple(weight.shape[:1]):
        raise weight_error(parts, checkpoint, f"has {weight.shape[0]} rows, but SCB is {scale.dtype} of {scale.shape}")
    if "weight_format" in parts and int(checkpoint.tensor(parts["weight_format"]).flatten()[0]) != 0:
        raise weight_error(parts, checkpoint, "is not stored row by row, which current versions of bitsandbytes read")
    return tuple(weight.shape)


def _shape_4bit(parts: PartNames, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape that the quant_state promises, once every table has the size it takes."""
    states = [part for part in parts if part in _STATES]
    if len(states) != 1:
        raise weight_error(parts, checkpoint, f"has {len(states)} of {', '.join(_STATES)}, and needs one")
    state = _state(parts, states[0], checkpoint)
    nested = "nested_absmax" in parts
    _require(parts, _TABLES if nested else _TABLES[:2], checkpoint)
    count = math.prod(state["shape"])
    blocks = -(-count // state["blocksize"])
    _require_packed(parts, (count + 1) // 2, checkpoint)
    _require_table(parts, "quant_map", "float32", 16, checkpoint)
    _require_table(parts, "absmax", "uint8" if nested else "float32", blocks, checkpoint)
    if nested:
        _require_table(parts, "nested_absmax", "float32", -(-blocks // state["nested_blocksize"]), checkpoint)
        _require_table(parts, "nested_quant_map", "float32", 256, checkpoint)
    return tuple(state["shape"])


def _state(parts: PartNames, part: str, checkpoint: Checkpoint) -> dict[str, Any]:
    info = checkpoint.info(parts[part])
    if info.dtype != "uint8" or info.nbytes > _STATE_BYTES:
        raise weight_error(parts, checkpoint, f"has a {part} of {info.nbytes} bytes of {info.dtype}")
    try:
        state = json.loads(bytes(checkpoint.tensor(parts[part]).flatten().tolist()))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or not _plausible(state, part.rpartition("__")[2], "nested_absmax" in parts):
        raise weight_error(parts, checkpoint, f"has a {part} that makes no sense")
    return state


def _plausible(state: dict[str, Any], kind: str, nested: bool) -> bool:
    shape, offset = state.get("shape"), state.get("nested_offset")
    return (
        set(state) == {"quant_type", "blocksize", "dtype", "shape", *(_NESTED if nested else ())}
        and isinstance(shape, list)
        and len(shape) == 2
        and all(type(n) is int and 0 < n < 2**31 for n in shape)
        and state["quant_type"] == kind
        and state["blocksize"] in _BLOCK_SIZES
        and state["dtype"] in COMPUTE_DTYPES
        and (not nested or (state["nested_blocksize"] in _BLOCK_SIZES and state["nested_dtype"] in COMPUTE_DTYPES))
        and (not nested or (isinstance(offset, (int, float)) and math.isfinite(offset)))
    )


def _require(parts: PartNames, names: tuple[str, ...], checkpoint: Checkpoint) -> None:
    lacking = [name for name in names if name not in parts]
    if lacking:
        raise weight_error(parts, checkpoint, f"lacks its {', '.join(lacking)}")


def _require_packed(parts: PartNames, nbytes: int, checkpoint: Checkpoint) -> None:
    found = checkpoint.info(parts["weight"]).nbytes
    if not nbytes <= found < nbytes + 8:  # a storage of wider elements is padded to whole ones
        raise weight_error(parts, checkpoint, f"needs {nbytes} bytes, and the file holds {found}")


def _require_table(parts: PartNames, part: str, dtype: str, count: int, checkpoint: Checkpoint) -> None:
    info = checkpoint.info(parts[part])
    if info.dtype != dtype or math.prod(info.shape) != count:
        raise weight_error(
            parts,
            checkpoint,
            f"needs {count} {dtype} numbers of {part}, and the file holds {info.shape} of {info.dtype}",
        )
