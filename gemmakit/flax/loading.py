"""From a checkpoint to parameters and back: every difference is named, each tensor goes straight to its place."""

from __future__ import annotations

import functools
import math
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemmakit.checkpoint import LazyTensor, require_memory
from gemmakit.checkpoint.arrays import as_bytes
from gemmakit.checkpoint.formats import OrbaxFile, is_orbax
from gemmakit.checkpoint.formats.msgpack import Leaf, encode
from gemmakit.checkpoint.publishing import MSGPACK, encode_files
from gemmakit.checkpoint.shards import save_shards
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, InputError
from gemmakit.flax.layers import embedding_init
from gemmakit.flax.names import PREFIX, pytorch_name
from gemmakit.flax.sharding import Rules
from gemmakit.flax.sources import Source, Stored, is_head


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


def config_of(name: Any, config: GemmaConfig | None, hub: dict[str, Any], overrides: dict[str, Any]) -> GemmaConfig:
    if config is not None:
        if overrides:
            raise InputError(f"config and {', '.join(overrides)} are both given: set the fields in the config.")
        return config
    if is_orbax(name):
        config = OrbaxFile(Path(name)).config()
        config.update(overrides)
        return config
    config = GemmaConfig.from_pretrained(name, **hub, **overrides)
    unknown = [k for k in overrides if k in config.extra]
    if unknown:
        raise InputError(f"from_pretrained has no argument {', '.join(unknown)}, nor has GemmaConfig such a field.")
    if "quantization_config" in config.extra:
        raise CheckpointError(f"{name} holds quantized weights, which the Flax backend cannot read.")
    return config


def load(
    model: Any, source: Source, shapes: dict[str, Any], dtype: Any, rules: Rules | None, ignore_mismatched: bool
) -> dict[str, jax.Array]:
    """path -> array for every path of `shapes`. dtype: None keeps what is stored.

    Raises CheckpointError, naming every difference between file and model, and NotEnoughMemory.
    """
    _refuse_differences(type(model).__name__, source, shapes)
    dtype = None if dtype is None else dtype_of(dtype)
    _require_room(source, dtype)
    out: dict[str, jax.Array] = {}
    for path, shape in shapes.items():
        stored = source.held.get(path)
        if stored is not None and stored.shape != tuple(shape.shape):
            if not (ignore_mismatched and is_head(path)):
                raise CheckpointError(
                    f"{path} has shape {stored.shape} in {source.where}, but the config asks for {tuple(shape.shape)}."
                )
            stored = None
        if stored is None:
            warnings.warn(f"{path} not in the checkpoint: freshly initialised. Train it before use.", stacklevel=4)
        value = fresh(path, shape, model.key, model.config) if stored is None else stored.read()
        out[path] = _place(value, dtype, None if rules is None else rules.parameter(path, value.shape))
    return out


def _refuse_differences(name: str, source: Source, shapes: dict[str, Any]) -> None:
    missing = [p for p in shapes if p not in source.held and not is_head(p)]
    if missing:
        raise CheckpointError(f"{source.where} lacks {_listed(missing)}, which {name} needs.")
    unknown = [n for n in source.unused if not is_head(n.replace(".", "/"))]
    if unknown:
        raise CheckpointError(
            f"{source.where} holds {_listed(unknown)}, for which {name} with this config has no place."
        )
    heads = [n for n in source.unused if n not in unknown and not n.startswith("lm_head")]
    if heads:
        warnings.warn(f"{source.where}: {_listed(heads)} not used by {name}.", stacklevel=5)


def _require_room(source: Source, dtype: Any) -> None:
    def size(stored: Stored) -> int:
        changes = dtype is not None and "float" in stored.dtype
        return math.prod(stored.shape) * np.dtype(dtype if changes else stored.dtype).itemsize

    require_memory(sum(map(size, source.held.values())), f"{source.where} as parameters")


def _place(array: Any, dtype: Any, sharding: Any) -> jax.Array:
    """From a mapped view to its devices: each takes only its part, converted on the way."""
    dtype = array.dtype if dtype is None else dtype
    if sharding is None:  # on the CPU the mapped bytes themselves, where dtype and order are kept
        return jax.device_put(array.astype(dtype, copy=False) if isinstance(array, np.ndarray) else array.astype(dtype))
    return jax.make_array_from_callback(array.shape, sharding, lambda part: np.asarray(array[part]).astype(dtype))


def pytorch_tensor(path: str, leaf: jax.Array) -> LazyTensor:
    transposed = pytorch_name(path)[1]
    shape = tuple(leaf.shape[::-1] if transposed else leaf.shape)
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


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
