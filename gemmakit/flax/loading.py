"""From a checkpoint to parameters and back: every difference is named, each tensor goes straight to its place."""

from __future__ import annotations

import functools
import math
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemmakit.checkpoint import Checkpoint, LazyTensor, TensorInfo, require_memory
from gemmakit.checkpoint.arrays import as_bytes
from gemmakit.checkpoint.formats.msgpack import Leaf, encode
from gemmakit.checkpoint.layout import differences, tied_names, warn_of_copies
from gemmakit.checkpoint.save import MSGPACK, encode_files, save_shards
from gemmakit.checkpoint.settings import config_for
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, InputError
from gemmakit.flax.layers import embedding_init
from gemmakit.flax.names import PREFIX, pytorch_name
from gemmakit.flax.sharding import Rules
from gemmakit.hub import HubOptions


def fresh(path: str, shape: Any, key: jax.Array, config: GemmaConfig) -> jax.Array:
    """One fresh parameter. Made leaf by leaf: compiled together, the random numbers of all layers take minutes."""
    last = path.rpartition("/")[2]
    if last in ("weight", "bias"):
        return jnp.zeros(shape.shape, shape.dtype)
    pad = config.pad_token_id if last == "embedding" else None
    # A path gives the same numbers in every class that has it.
    return _drawn(
        key, np.uint32(zlib.crc32(path.removeprefix(PREFIX).encode())), shape.shape, config.initializer_range, pad
    )


@functools.partial(jax.jit, static_argnames=("shape", "std", "pad"))
def _drawn(key: jax.Array, salt: np.uint32, shape: tuple[int, ...], std: float, pad: int | None) -> jax.Array:
    return embedding_init(std, pad)(jax.random.fold_in(key, salt), shape)


def config_of(name: Any, given: GemmaConfig | None, hub: HubOptions, overrides: dict[str, Any]) -> GemmaConfig:
    """The configuration to load with."""
    config = config_for(name, given, hub, overrides)
    if given is None and "quantization_config" in config.extra:
        raise CheckpointError(f"{name} holds quantized weights, which the Flax backend cannot read.")
    return config


def load(
    model: Any, checkpoint: Checkpoint, shapes: dict[str, Any], dtype: Any, rules: Rules | None, ignore_mismatched: bool
) -> dict[str, jax.Array]:
    """path -> array for every path of `shapes`. dtype: None keeps what is stored.

    Raises CheckpointError, naming every difference between file and model, and NotEnoughMemory.
    """
    kind = type(model).__name__
    names = {path: pytorch_name(path) for path in shapes}
    wanted = {names[path][0]: _turned(shape.shape, names[path][1]) for path, shape in shapes.items()}
    tied = tied_names(model.config, kind.removeprefix("Flax"))
    found = differences(wanted, checkpoint.shapes(), tied, ignore_mismatched=ignore_mismatched)
    found.refuse(checkpoint.where, kind)
    found.warn(checkpoint.where, kind, stacklevel=3)
    warn_of_copies(checkpoint, found.copies, stacklevel=3, framework="np")
    dtype = None if dtype is None else dtype_of(dtype)
    _require_room(checkpoint, found.names.values(), dtype)
    out: dict[str, jax.Array] = {}
    for path, shape in shapes.items():
        name, transposed = names[path]
        if name in found.names:
            value = checkpoint.tensor(found.names[name], framework="np")
            value = value.T if transposed else value
        else:
            value = fresh(path, shape, model.key, model.config)
        out[path] = _place(value, dtype, None if rules is None else rules.parameter(path, value.shape))
    return out


def _turned(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    return tuple(shape[::-1] if transposed else shape)


def _require_room(checkpoint: Checkpoint, names: Iterable[str], dtype: Any) -> None:
    def size(info: TensorInfo) -> int:
        changes = dtype is not None and "float" in info.dtype
        return math.prod(info.shape) * np.dtype(dtype if changes else info.dtype).itemsize

    require_memory(sum(size(checkpoint.info(name)) for name in names), f"{checkpoint.where} as parameters")


def _place(array: Any, dtype: Any, sharding: Any) -> jax.Array:
    """From a mapped view to its devices: each takes only its part, converted on the way."""
    dtype = array.dtype if dtype is None else dtype
    if sharding is None:  # on the CPU the mapped bytes themselves, where dtype and order are kept
        return jax.device_put(array.astype(dtype, copy=False) if isinstance(array, np.ndarray) else array.astype(dtype))
    return jax.make_array_from_callback(array.shape, sharding, lambda part: np.asarray(array[part]).astype(dtype))


def pytorch_tensor(path: str, leaf: jax.Array) -> LazyTensor:
    transposed = pytorch_name(path)[1]
    shape = _turned(leaf.shape, transposed)
    return LazyTensor(str(leaf.dtype), shape, lambda: np.asarray(leaf).T if transposed else np.asarray(leaf))


def save_msgpack(leaves: dict[str, jax.Array], folder: Path, files: dict[str, str]) -> None:
    """flax_model.msgpack and the small files beside it, a leaf at a time; as `save_checkpoint`, whole or not at all."""
    held = {
        path: Leaf(str(leaf.dtype), tuple(leaf.shape), functools.partial(as_bytes, leaf))
        for path, leaf in leaves.items()
    }
    save_shards(folder, MSGPACK, held, encode, sys.maxsize, encode_files(files))


def dtype_of(dtype: Any) -> Any:
    """A floating numpy dtype from a jax type, a numpy dtype or a name."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if str(found) not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype is {dtype!r}; it must be float32, bfloat16 or float16.")
    return found
