"""The tensors in which bitsandbytes layers are stored, checked before native code reads them.

4 bits: `weight`, `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4` (JSON text as bytes), and
with double quantization `weight.nested_absmax`, `weight.nested_quant_map`. 8 bits: `weight`, `SCB`, `weight_format`.
"""

from __future__ import annotations

import json
import math
from typing import Any

from gemmakit.checkpoint import Checkpoint
from gemmakit.pytorch.quantize.quantizer import Parts, damaged
from gemmakit.quantization import COMPUTE_DTYPES, QUANT_TYPES

_STATES = tuple(f"quant_state.bitsandbytes__{kind}" for kind in QUANT_TYPES)
_TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# What the text of a quant_state may hold; `shape` aside.
_NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")
_BLOCK_SIZES = tuple(2**n for n in range(5, 13))
_STATE_BYTES = 4096  # about 150 are used


def parts_4bit(key: str, checkpoint: Checkpoint) -> Parts:
    """Whatever is there: `shape_4bit` says what lacks."""
    found = {part: f"{key}.{part}" for part in (*_TABLES, *_STATES) if f"{key}.{part}" in checkpoint}
    return {"weight": key, **found} if found or checkpoint.info(key).dtype == "uint8" else {}


def parts_8bit(key: str, checkpoint: Checkpoint) -> Parts:
    owner = key.removesuffix("weight")
    found = {part: owner + part for part in ("SCB", "weight_format") if owner + part in checkpoint}
    return {"weight": key, **found} if found or checkpoint.info(key).dtype == "int8" else {}


def shape_8bit(parts: Parts, checkpoint: Checkpoint) -> tuple[int, ...]:
    _require(parts, ("weight", "SCB"), checkpoint)
    weight, scale = (checkpoint.info(parts[name]) for name in ("weight", "SCB"))
    if weight.dtype != "int8" or len(weight.shape) != 2:
        raise damaged(parts, checkpoint, f"is {weight.dtype} of shape {weight.shape}, not an int8 matrix")
    if scale.dtype != "float32" or tuple(scale.shape) != tuple(weight.shape[:1]):
        raise damaged(parts, checkpoint, f"has {weight.shape[0]} rows, but SCB is {scale.dtype} of {scale.shape}")
    if "weight_format" in parts and int(checkpoint.tensor(parts["weight_format"]).flatten()[0]) != 0:
        raise damaged(parts, checkpoint, "is not stored row by row, which current versions of bitsandbytes read")
    return tuple(weight.shape)


def shape_4bit(parts: Parts, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape that the quant_state promises, once every table has the size it takes."""
    states = [part for part in parts if part in _STATES]
    if len(states) != 1:
        raise damaged(parts, checkpoint, f"has {len(states)} of {', '.join(_STATES)}, and needs one")
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


def _state(parts: Parts, part: str, checkpoint: Checkpoint) -> dict[str, Any]:
    info = checkpoint.info(parts[part])
    if info.dtype != "uint8" or info.nbytes > _STATE_BYTES:
        raise damaged(parts, checkpoint, f"has a {part} of {info.nbytes} bytes of {info.dtype}")
    try:
        state = json.loads(bytes(checkpoint.tensor(parts[part]).flatten().tolist()))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or not _plausible(state, part.rpartition("__")[2], "nested_absmax" in parts):
        raise damaged(parts, checkpoint, f"has a {part} that makes no sense")
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


def _require(parts: Parts, names: tuple[str, ...], checkpoint: Checkpoint) -> None:
    lacking = [name for name in names if name not in parts]
    if lacking:
        raise damaged(parts, checkpoint, f"lacks its {', '.join(lacking)}")


def _require_packed(parts: Parts, nbytes: int, checkpoint: Checkpoint) -> None:
    found = checkpoint.info(parts["weight"]).nbytes
    if not nbytes <= found < nbytes + 8:  # a storage of wider elements is padded to whole ones
        raise damaged(parts, checkpoint, f"needs {nbytes} bytes, and the file holds {found}")


def _require_table(parts: Parts, part: str, dtype: str, count: int, checkpoint: Checkpoint) -> None:
    info = checkpoint.info(parts[part])
    if info.dtype != dtype or math.prod(info.shape) != count:
        raise damaged(
            parts,
            checkpoint,
            f"needs {count} {dtype} numbers of {part}, and the file holds {info.shape} of {info.dtype}",
        )
