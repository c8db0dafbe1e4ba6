"""Parameters: by path, as one stack, with adapters, on a mesh of devices, from a checkpoint and back.

A parameter's path is its keys in the tree joined by "/": "model/layers/0/self_attn/q_proj/kernel", of shape (in, out);
gemmakit.checkpoint.formats says what files call it. r is the rank of an adapter.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemmakit.checkpoint import Checkpoint, LazyTensor, TensorInfo, require_memory
from gemmakit.checkpoint.arrays import as_bytes
from gemmakit.checkpoint.formats.msgpack import Leaf, encode, pytorch_name
from gemmakit.checkpoint.layout import SCALAR, differences, tied_names, warn_of_copies
from gemmakit.checkpoint.save import MSGPACK, encode_files, save_shards
from gemmakit.checkpoint.settings import config_for
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, InputError
from gemmakit.flax.cache import Cache
from gemmakit.flax.layers import embedding_init
from gemmakit.hub import HubOptions

PREFIX = "model/"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"layers/(\d+)/(.+)")

# -- by path -----------------------------------------------------------------------------------------------------------


def flat(params: Any) -> dict[str, Any]:
    """A nested tree as {"a/b/c": leaf}."""
    return {"/".join(path): leaf for path, leaf in flatten_dict(_plain(params)).items()}


def nested(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in params.items()})


def _plain(tree: Any) -> Any:
    """Dictionaries where older code has FrozenDict."""
    return {str(k): _plain(v) for k, v in tree.items()} if hasattr(tree, "items") else tree


def is_stacked(params: Any) -> bool:
    """Whether the layers are one stack. A tree without layers (adapters of a head, say) is none."""
    layers = params.get("model", params).get("layers")
    return layers is not None and "0" not in layers


def stack_layers(params: Any) -> dict[str, Any]:
    """The tree of scanned layers: "layers/self_attn/..." once, with a leading layer axis. Copies; works under jit."""
    if is_stacked(params):
        return params
    out, layers = {}, {}
    for path, leaf in flat(params).items():
        match = _LAYER.fullmatch(path.removeprefix(PREFIX))
        if match is None:
            out[path] = leaf
        else:
            key = (PREFIX if path.startswith(PREFIX) else "") + "layers/" + match[2]
            layers.setdefault(key, {})[int(match[1])] = leaf
    return nested({**out, **{key: jnp.stack([found[i] for i in sorted(found)]) for key, found in layers.items()}})


def unstack_layers(params: Any) -> dict[str, Any]:
    """The tree of released checkpoints: "layers/0/self_attn/...", a layer each. Copies; works under jit."""
    if not is_stacked(params):
        return params
    out = {}
    for path, leaf in flat(params).items():
        head, slash, rest = path.rpartition("layers/")
        out.update({f"{head}layers/{i}/{rest}": leaf[i] for i in range(leaf.shape[0])} if slash else {path: leaf})
    return nested(out)


# -- fresh ones and adapters -------------------------------------------------------------------------------------------


def fresh(path: str, shape: Any, key: jax.Array, config: GemmaConfig) -> jax.Array:
    """One fresh parameter. Made leaf by leaf: compiled together, the random numbers of all layers take minutes."""
    last = path.rpartition("/")[2]
    constants = {"weight": 1.0 - config.kind.norm_offset, "bias": 0.0, SCALAR: 1.0}
    if last in constants:
        return jnp.full(shape.shape, constants[last], shape.dtype)
    pad = config.pad_token_id if last == "embedding" else None
    # A path gives the same numbers in every class that has it.
    salt = np.uint32(zlib.crc32(path.removeprefix(PREFIX).encode()))
    return _drawn(key, salt, shape.shape, config.initializer_range, pad)


@functools.partial(jax.jit, static_argnames=("shape", "std", "pad"))
def _drawn(key: jax.Array, salt: np.uint32, shape: tuple[int, ...], std: float, pad: int | None) -> jax.Array:
    return embedding_init(std, pad)(jax.random.fold_in(key, salt), shape)


def init_lora(
    params: Any, rank: int, rng: jax.Array, *, targets: Iterable[str] = ("q_proj", "v_proj")
) -> dict[str, Any]:
    """Adapters for the projections of every layer that `targets` names; pass them as `lora=` and train them alone.

    Each is a (in, r), drawn, and b (r, out), zero, so that a fresh adapter changes nothing. Source: arXiv:2106.09685,
    with alpha = rank.

    Raises InputError for a rank below 1 or a name that is no projection.
    """
    targets = tuple(targets)
    unknown = [name for name in targets if name not in LORA_TARGETS]
    if rank < 1 or unknown or not targets:
        raise InputError(
            f"LoRA of rank {rank} on {', '.join(targets) or 'nothing'}: the rank must be at least 1 and the targets "
            f"among {', '.join(LORA_TARGETS)}."
        )
    out: dict[str, jax.Array] = {}
    for path, kernel in flat(params).items():
        above, _, last = path.rpartition("/")
        if last == "kernel" and above.rpartition("/")[2] in targets:
            *stack, wide, narrow = kernel.shape
            rng, key = jax.random.split(rng)
            out[f"{above}/a"] = jax.random.normal(key, (*stack, wide, rank), jnp.float32) * wide**-0.5
            out[f"{above}/b"] = jnp.zeros((*stack, rank, narrow), jnp.float32)
    return nested(out)


def merge_lora(params: Any, lora: Any) -> dict[str, Any]:
    """The parameters with every adapter's product added to its kernel, in the kernel's dtype."""
    out, adapters = flat(params), flat(lora)
    for path, a in adapters.items():
        above, _, last = path.rpartition("/")
        if last == "a":
            kernel = out[f"{above}/kernel"]
            update = a.astype(jnp.float32) @ adapters[f"{above}/b"].astype(jnp.float32)
            out[f"{above}/kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return nested(out)


# -- on a mesh ---------------------------------------------------------------------------------------------------------
# Parameters, batch and cache are placed; the compiler derives the rest and the communication it needs.

# What an axis of an array means -> the axis of the mesh that splits it; None keeps it whole on every device.
# {"hidden": "data"} besides these also splits the weights over the data axis.
AXES: dict[str, str | None] = {
    "batch": "data",
    "vocab": "tensor",
    "layer_vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "hidden": None,
}

# pattern of a parameter's path -> what its axes mean. A stack of layers has one axis more in front.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens/embedding$", ("vocab", "hidden")),
    (r"embed_tokens_per_layer/embedding$", ("layer_vocab", None)),
    (r"q_proj/kernel$", ("hidden", "heads")),
    (r"[kv]_proj/kernel$", ("hidden", "kv_heads")),
    (r"o_proj/kernel$", ("heads", "hidden")),
    (r"(gate|up)_proj/kernel$", ("hidden", "mlp")),
    (r"down_proj/kernel$", ("mlp", "hidden")),
    (r"lm_head/kernel$", ("hidden", "vocab")),
    (r"q_proj/bias$", ("heads",)),
    (r"[kv]_proj/bias$", ("kv_heads",)),
)
CACHE = ("batch", "kv_heads", None, None)


def make_mesh(data: int = 1, tensor: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes "data" (rows of a batch) and "tensor" (heads, MLP, vocabulary).

    tensor: by default all devices that `data` leaves. Raises InputError when they do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    tensor = len(devices) // data if tensor is None and data > 0 else tensor
    if tensor is None or data < 1 or tensor < 1 or data * tensor > len(devices):
        raise InputError(
            f"a mesh of data={data} and tensor={tensor} needs {data} x {tensor} of {len(devices)} devices."
        )
    grid = np.asarray(devices[: data * tensor], dtype=object).reshape(data, tensor)
    return Mesh(grid, ("data", "tensor"))


class Rules:
    """How the arrays of one model lie on one mesh."""

    def __init__(self, mesh: Mesh, config: GemmaConfig, axes: Mapping[str, str | None] | None = None):
        self.mesh = mesh
        self.axes = {**AXES, **(axes or {})}
        specs = [config.layer(i) for i in range(config.num_hidden_layers)]
        # What cannot be shared out evenly stays whole: no head is cut, and multi-query's one kv head is everyone's.
        self.counts = {
            "vocab": config.vocab_size,
            "heads": math.gcd(*(spec.num_attention_heads for spec in specs)),
            "kv_heads": math.gcd(*(spec.num_key_value_heads for spec in specs)),
            "mlp": math.gcd(*(spec.intermediate_size for spec in specs)),
            "hidden": config.hidden_size,
        }

    def spec(self, meanings: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """meanings: of the last axes of `shape`; axes before them are whole."""
        whole = [None] * (len(shape) - len(meanings))
        return PartitionSpec(*whole, *(self._axis(m, n) for m, n in zip(meanings, shape[len(whole) :], strict=True)))

    def _axis(self, meaning: str | None, size: int) -> str | None:
        name = None if meaning is None else self.axes[meaning]
        if name is None or name not in self.mesh.shape:
            return None
        return name if self.counts.get(meaning or "", size) % self.mesh.shape[name] == 0 else None

    def parameter(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """path: "model/layers/0/self_attn/q_proj/kernel"."""
        for pattern, meanings in PARAMETERS:
            if re.search(pattern, path):
                return NamedSharding(self.mesh, self.spec(meanings, shape))
        return NamedSharding(self.mesh, PartitionSpec())

    def parameters(self, params: Any) -> dict[str, Any]:
        """The same tree, laid out."""
        leaves = flat(params).items()
        return nested({path: jax.device_put(leaf, self.parameter(path, leaf.shape)) for path, leaf in leaves})

    def batch(self, array: Any) -> Any:
        """Rows over the data axis, if they divide."""
        meanings = ("batch", *(None,) * (np.ndim(array) - 1))
        return jax.device_put(array, NamedSharding(self.mesh, self.spec(meanings, np.shape(array))))

    def cache(self, cache: Cache) -> Cache:
        def place(buffer: jax.Array) -> jax.Array:
            return jax.device_put(buffer, NamedSharding(self.mesh, self.spec(CACHE, buffer.shape)))

        index = jax.device_put(cache["index"], NamedSharding(self.mesh, PartitionSpec()))
        return {"layers": jax.tree_util.tree_map(place, cache["layers"]), "index": index}


def shard(params: Any, mesh: Mesh, config: GemmaConfig, axes: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """The same parameters, laid out on the mesh. axes: over the defaults of `AXES`."""
    return Rules(mesh, config, axes).parameters(params)


# -- files -------------------------------------------------------------------------------------------------------------


def config_of(name: Any, given: GemmaConfig | None, hub: HubOptions, overrides: dict[str, Any]) -> GemmaConfig:
    """The configuration to load with."""
    config = config_for(name, given, hub, overrides)
    if given is None and "quantization_config" in config.extra:
        raise CheckpointError(f"{name} holds quantized weights, which the Flax backend cannot read.")
    return config


def load(
    model: Any, checkpoint: Checkpoint, shapes: dict[str, Any], dtype: Any, rules: Rules | None, ignore_mismatched: bool
) -> dict[str, jax.Array]:
    """path -> array for every path of `shapes`, each tensor straight to its place. dtype: None keeps what is stored.

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
