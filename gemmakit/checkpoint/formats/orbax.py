"""Orbax folders as google-deepmind/gemma writes them for Gemma 1, 2 and 3, as arrays in the PyTorch layout.

So are those that hold the parameters of a Flax model of gemmakit or of transformers, as training loops save them.

Axis letters: D hidden, F mlp, N heads, K kv heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmakit.checkpoint.arrays import BITS, TensorInfo, to_jax
from gemmakit.checkpoint.formats.msgpack import pytorch_name
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, MissingDependency
from gemmakit.family import PRESETS, kind_of

MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")
# Google's tables are padded to a multiple of 128 rows; the released vocabulary has 256000 ids.
PADDED_VOCABULARY, VOCABULARY = 256128, 256000

Rearrange = Callable[[Any], Any]
Shape = tuple[int, ...]


def _projection(w: Any) -> Any:
    """(heads, D, H) -> (heads * H, D)."""
    return w.transpose(0, 2, 1).reshape(-1, w.shape[1])


def _output(w: Any) -> Any:
    """(N, H, D) -> (D, N * H)."""
    return w.reshape(-1, w.shape[-1]).T


def _part(i: int, change: Rearrange) -> Rearrange:
    return lambda w: change(w[i])


def _same(w: Any) -> Any:
    return w


def _turned(w: Any) -> Any:
    return w.T


# name here (within its layer) -> the names it may have there, and how it becomes ours.
# Shapes there: q (N, D, H), kv (2, K, D, H), qkv (3, N, D, H), attn_vec (N, H, D), gating (2, D, F), linear (F, D).
# Older releases store the two of the MLP as plain arrays, later ones in a dictionary under "w"; some have gating
# (2, F, D), which `_settled` turns.
TABLE: dict[str, tuple[tuple[str, Rearrange], ...]] = {
    "self_attn.q_proj.weight": (("attn/q_einsum/w", _projection), ("attn/qkv_einsum/w", _part(0, _projection))),
    "self_attn.k_proj.weight": (
        ("attn/kv_einsum/w", _part(0, _projection)),
        ("attn/qkv_einsum/w", _part(1, _projection)),
    ),
    "self_attn.v_proj.weight": (
        ("attn/kv_einsum/w", _part(1, _projection)),
        ("attn/qkv_einsum/w", _part(2, _projection)),
    ),
    "self_attn.o_proj.weight": (("attn/attn_vec_einsum/w", _output),),
    "mlp.gate_proj.weight": (("mlp/gating_einsum", _part(0, _turned)), ("mlp/gating_einsum/w", _part(0, _turned))),
    "mlp.up_proj.weight": (("mlp/gating_einsum", _part(1, _turned)), ("mlp/gating_einsum/w", _part(1, _turned))),
    "mlp.down_proj.weight": (("mlp/linear", _turned), ("mlp/linear/w", _turned)),
    "self_attn.q_norm.weight": (("attn/_query_norm/scale", _same),),
    "self_attn.k_norm.weight": (("attn/_key_norm/scale", _same),),
}
# Norms by their place in a layer, as in `family.Norms`; their names here are the member's.
NORMS = ("pre_attention_norm/scale", "post_attention_norm/scale", "pre_ffw_norm/scale", "post_ffw_norm/scale")
OUTSIDE = {"embedder/input_embedding": "model.embed_tokens.weight", "final_norm/scale": "model.norm.weight"}
# What only images need begins so, with the keys joined by dots.
IMAGES = ("vision_encoder.", "embedder.mm_")
_LAYER = re.compile(r"layer_(\d+)/(.+)")
# In the tree of a Flax model; and a layer of it that has no number.
FLAX_EMBEDDING = "/embed_tokens/embedding"
_STACK = re.compile(r"/layers/(?!\d+/)")


def sniff(path: Path) -> bool:
    """A folder that Orbax wrote."""
    return is_orbax(path)


def open(path: Path) -> OrbaxFile:
    """The folder, with as many rows of the embedding as the released vocabulary has."""
    return OrbaxFile(path)


def is_orbax(name: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that Orbax wrote. Beside a config.json the weights are its own where none is another's.

    A folder of another kind may well hold one called "checkpoint".
    """
    folder = Path(name)
    marks = MARKS[:3] if (folder / "config.json").is_file() else MARKS
    others = (".safetensors", ".msgpack", ".bin", ".gguf")
    return (
        folder.is_dir()
        and any((folder / mark).exists() for mark in marks)
        and not any(path.suffix in others for path in folder.iterdir())
    )


@dataclass(frozen=True)
class _Stored:
    """One array of the folder: its keys, dtype name and shape there."""

    keys: tuple[str, ...]
    dtype: str
    shape: Shape


class OrbaxFile:
    """An Orbax folder as one file of the PyTorch layout, its arrays read one at a time.

    vocab_size: rows of the embedding that are used; None takes the released vocabulary of a padded table.
    Needs jax and orbax-checkpoint. Raises MissingDependency, CheckpointError.
    """

    kind = "orbax"

    def __init__(self, folder: Path, vocab_size: int | None = None):
        self.path = folder
        self.metadata: Mapping[str, str] = {}
        self._held = _listing(folder)
        self._vocab_size = vocab_size
        self._places = self._named()
        self.tensors: Mapping[str, TensorInfo] = {
            name: _info(self._held[source], self._ours(source, change))
            for name, (source, change) in self._places.items()
        }

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        source, change = self._places[name]
        stored = self._held[source]
        array = change(self._settled(source, _read(self.path, stored)))
        return array if framework == "np" else to_jax(array) if framework == "flax" else _to_torch(array, device)

    def close(self) -> None:
        """Nothing is kept open."""

    @property
    def model_type(self) -> str:
        """Which Gemma, by the norms of its first layer; no Gemma 1 has others than two."""
        if "layer_0/attn/_query_norm/scale" in self._held:
            return "gemma3_text"
        return "gemma2" if f"layer_0/{NORMS[1]}" in self._held else "gemma"

    @property
    def is_flax(self) -> bool:
        """Whether these are a Flax model's own parameters, by the names of its tree."""
        return any(f"/{name}".endswith(FLAX_EMBEDDING) for name in self._held)

    def config(self) -> GemmaConfig:
        """The configuration, where no config.json lies in the folder: from the shapes.

        Of Gemma 2 and 3 shapes do not tell windows, caps and tables, so it is that of the released size of these; those
        of a Flax model's own parameters do not tell heads. Raises CheckpointError.
        """
        if self.is_flax:
            raise CheckpointError(
                f"{self.path} holds the parameters of a Flax model, whose shapes do not tell its heads: put its "
                "config.json into the folder, or name it, config= or --config."
            )
        held = {name: stored.shape for name, stored in self._held.items()}
        layers = {name.split("/")[0] for name in held if name.startswith("layer_")}
        try:
            rows, hidden = held["embedder/input_embedding"]
            heads, head_dim, _ = held["layer_0/attn/attn_vec_einsum/w"]
            kv = held.get("layer_0/attn/kv_einsum/w")
            linear = held.get("layer_0/mlp/linear") or held["layer_0/mlp/linear/w"]
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path} holds no Gemma: it has {', '.join(sorted(held)[:4])}, ...") from error
        shape: dict[str, Any] = dict(
            hidden_size=hidden,
            intermediate_size=linear[0],
            num_hidden_layers=len(layers),
            num_attention_heads=heads,
            num_key_value_heads=heads if kv is None else kv[1],
            head_dim=head_dim,
        )
        kind = kind_of(self.model_type)
        more: dict[str, Any] = dict(vocab_size=self._rows(rows), architectures=[kind.classes["causal_lm"]])
        if self.model_type == "gemma":
            return GemmaConfig(**shape, **more)
        released = (GemmaConfig.preset(size, **more) for size, preset in PRESETS.items()
                    if preset["model_type"] == self.model_type)  # fmt: skip
        found = next((c for c in released if all(getattr(c, name) == value for name, value in shape.items())), None)
        if found is None:
            raise CheckpointError(
                f"{self.path} holds a {kind.title} of no released size, and an Orbax folder does not say its window: "
                "name its config.json, config= or --config."
            )
        return found

    def _named(self) -> dict[str, tuple[str, Rearrange]]:
        """name here -> (name there, how it becomes ours); a name there that nothing claims is kept as it is."""
        places: dict[str, tuple[str, Rearrange]] = {}
        if self.is_flax:
            for source in self._held:
                name, transposed = pytorch_name(source)
                if _STACK.search(f"/{source}"):
                    raise CheckpointError(
                        f"{self.path}: {source!r} is a stack of all layers: save gemmakit.flax.unstack_layers(params)."
                    )
                places[name] = source, _turned if transposed else _same
            return places
        norms = {there: here for there, here in zip(NORMS, kind_of(self.model_type).norms, strict=True) if here}
        for source in self._held:
            layer = _LAYER.fullmatch(source)
            found: list[tuple[str, Rearrange]] = [(OUTSIDE[source], _same)] if source in OUTSIDE else []
            if layer is not None:
                found = [
                    (f"model.layers.{layer[1]}.{name}", change)
                    for name, sources in TABLE.items()
                    for there, change in sources
                    if there == layer[2]
                ]
                if layer[2] in norms:
                    found = [(f"model.layers.{layer[1]}.{norms[layer[2]]}.weight", _same)]
            for name, change in found or [(source.replace("/", "."), _same)]:
                if name in places:
                    raise CheckpointError(f"{self.path}: {places[name][0]!r} and {source!r} are both {name!r}.")
                places[name] = source, change
        return places

    def _ours(self, source: str, change: Rearrange) -> Shape:
        """The shape that an array will have, found on one that takes no memory."""
        import numpy as np

        stored = self._held[source]
        try:
            return tuple(change(self._settled(source, np.broadcast_to(np.int8(0), stored.shape))).shape)
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{self.path}: {source!r} has the shape {stored.shape}, as in no Gemma.") from error

    def _rows(self, rows: int) -> int:
        if self._vocab_size is not None:
            return self._vocab_size
        return VOCABULARY if rows == PADDED_VOCABULARY else rows

    def _settled(self, source: str, array: Any) -> Any:
        """The two things releases differ in: unused rows after the vocabulary, and the gating weight's orientation."""
        if source == "embedder/input_embedding":
            return array[: self._rows(array.shape[0])]
        linear = next((self._held[n].shape for n in _linears(source) if n in self._held), None)
        if linear is not None and array.shape[1:] == linear and linear[0] != linear[1]:
            return array.swapaxes(1, 2)
        return array


def _linears(source: str) -> tuple[str, ...]:
    """The down projections beside a gating weight: (F, D), which tell how that one lies. None for anything else."""
    layer, _, rest = source.partition("/")
    return (f"{layer}/mlp/linear", f"{layer}/mlp/linear/w") if rest.startswith("mlp/gating_einsum") else ()


def _info(stored: _Stored, shape: Shape) -> TensorInfo:
    count = 1
    for axis in shape:
        count *= axis
    return TensorInfo(stored.dtype, shape, 0, count * BITS[stored.dtype] // 8, mapped=False)


# -- Orbax -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _orbax(folder: Path) -> Generator[Any, None, None]:
    """The package, quietly; what it raises about a folder as a CheckpointError."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise MissingDependency(
            f"{folder} is an Orbax checkpoint, which jax and orbax-checkpoint read: `pip install 'gemmakit[flax]'`."
        ) from error
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of its own future
    try:
        yield ocp
    except CheckpointError:
        raise
    except Exception as error:  # a damaged folder can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder} is no Orbax checkpoint that can be read: {reason}") from error
    finally:
        logger.setLevel(level)


def _listing(folder: Path) -> dict[str, _Stored]:
    """name -> _Stored of every array, without the "params/" and "transformer/" that some releases put in front."""
    with _orbax(folder) as ocp:
        found = ocp.PyTreeCheckpointer().metadata(folder.absolute())
        found = getattr(found, "item_metadata", found)
        tree = getattr(found, "tree", found)
        leaves = dict(_leaves(tree, ()))
        held: dict[str, _Stored] = {}
        for keys, leaf in leaves.items():
            name = "/".join(keys).removeprefix("params/").removeprefix("transformer/")
            dtype = str(leaf.dtype)
            if dtype not in BITS or leaf.shape is None:
                raise CheckpointError(f"{folder}: {name!r} is {dtype} of shape {leaf.shape}, which is no weight.")
            held[name] = _Stored(keys, dtype, tuple(leaf.shape))
        if not held:
            raise CheckpointError(f"{folder} is an Orbax checkpoint without arrays.")
        return held


def _leaves(tree: Any, above: tuple[str, ...]) -> Generator[tuple[tuple[str, ...], Any], None, None]:
    if not hasattr(tree, "items"):
        yield above, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*above, str(key)))


def _read(folder: Path, stored: _Stored) -> Any:
    """One array, as numpy."""
    import numpy as np

    def within(leaf: Any) -> Any:
        for key in reversed(stored.keys):
            leaf = {key: leaf}
        return leaf

    with _orbax(folder) as ocp:
        asked = ocp.args.PyTreeRestore(
            item=within(0), restore_args=within(ocp.RestoreArgs(restore_type=np.ndarray)), transforms={}
        )
        tree = ocp.PyTreeCheckpointer().restore(folder.absolute(), args=asked)
        for key in stored.keys:
            tree = tree[key]
        array = np.asarray(tree)
        if tuple(array.shape) != stored.shape:
            raise CheckpointError(f"{folder}: {'/'.join(stored.keys)} is {array.shape}, announced as {stored.shape}.")
        return array


def _to_torch(array: Any, device: Any) -> Any:
    """The same bytes; a view where the array lies in row-major order one way or the other."""
    import numpy as np
    import torch

    if array.T.flags.c_contiguous and array.ndim == 2 and not array.flags.c_contiguous:
        return _to_torch(array.T, device).t()
    flat = np.ascontiguousarray(array).reshape(-1)
    dtype = getattr(torch, str(array.dtype))
    return torch.from_numpy(flat.view(np.uint8)).view(dtype).reshape(array.shape).to(device)
