"""A model on many devices: which axis of which array is split over which axis of the mesh, by name.

Parameters, batch and cache are placed; the compiler derives the rest and the communication it needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.flax.cache import Cache
from gemmakit.flax.names import flat, nested

# What an axis of an array means -> the axis of the mesh that splits it; None keeps it whole on every device.
# {"hidden": "data"} besides these also splits the weights over the data axis.
AXES: dict[str, str | None] = {
    "batch": "data",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "hidden": None,
}

# pattern of a parameter's path -> what its axes mean. A stack of layers has one axis more in front.
PARAMETERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"embed_tokens/embedding$", ("vocab", "hidden")),
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
        # What cannot be shared out evenly stays whole: no head is cut, and multi-query's one kv head is everyone's.
        self.counts = {
            "vocab": config.vocab_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "mlp": config.intermediate_size,
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
    rules = Rules(mesh, config, axes)
    placed = {path: jax.device_put(leaf, rules.parameter(path, leaf.shape)) for path, leaf in flat(params).items()}
    return nested(placed)
