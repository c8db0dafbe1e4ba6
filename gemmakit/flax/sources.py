"""Checkpoint files of every kind as arrays by parameter path, read one at a time.

Safetensors as PyTorch or Flax names them, Flax msgpack as transformers wrote it, Orbax as google-deepmind/gemma does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemmakit.checkpoint import Checkpoint, open_checkpoint
from gemmakit.checkpoint.index import read_index
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError
from gemmakit.flax.names import HEADS, flat, orbax_names, other_spelling, pytorch_name
from gemmakit.hub import find_file, find_files

MSGPACK = "flax_model.msgpack"
MSGPACK_INDEX = "flax_model.msgpack.index.json"
ORBAX_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")
# Tables that early releases stored and that every model computes.
COMPUTED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Stored:
    """One parameter in a file: shape and dtype name as the model has them, and how to read it (a view if it can be)."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass
class Source:
    """What a checkpoint holds for one model: path -> Stored, and the names in it that the model has no place for."""

    where: str
    held: dict[str, Stored] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def open_source(
    name: str | os.PathLike[str], paths: Iterable[str], config: GemmaConfig, where: dict[str, Any]
) -> Source:
    """Find the weights of `paths`: safetensors first, then msgpack, then Orbax.

    where: what `open_checkpoint` takes besides the name. Raises CheckpointError, UnsafeFile, HubError.
    """
    paths = list(paths)
    if is_orbax(name):
        return _from_arrays(str(name), _read_orbax(Path(name)), paths, config)
    hub = {k: v for k, v in where.items() if k not in ("allow_pickle", "variant")}
    if not any(find_file(name, n, optional=True, **hub) for n in ("model.safetensors", "model.safetensors.index.json")):
        found = find_file(name, MSGPACK, optional=True, **hub) or find_file(name, MSGPACK_INDEX, optional=True, **hub)
        if found is not None:
            return _from_msgpack(name, found, paths, hub)
    return _from_checkpoint(open_checkpoint(name, **where), paths)


def _from_checkpoint(checkpoint: Checkpoint, paths: list[str]) -> Source:
    """Names with dots; kernels transposed unless a Flax model wrote them."""
    as_flax = checkpoint.metadata.get("format") == "flax"
    source = Source(str(checkpoint.files[0].parent))
    names = [n.replace(".", "/") for n in checkpoint.names()]
    used = set()
    for path in paths:
        spelt = other_spelling(path, names)
        name, transposed = (spelt.replace("/", "."), False) if as_flax else pytorch_name(spelt)
        if name in checkpoint:
            used.add(name)
            source.held[path] = _tensor(checkpoint, name, transposed)
    source.unused = [n for n in checkpoint.names() if n not in used and not n.endswith(COMPUTED)]
    return source


def _tensor(checkpoint: Checkpoint, name: str, transposed: bool) -> Stored:
    info = checkpoint.info(name)

    def read() -> np.ndarray:
        array = checkpoint.tensor(name, framework="np")
        return array.T if transposed else array

    return Stored(info.shape[::-1] if transposed else tuple(info.shape), info.dtype, read)


def _from_msgpack(name: str | os.PathLike[str], found: Path, paths: list[str], hub: dict[str, Any]) -> Source:
    files = [found]
    if found.suffix == ".json":
        shards = sorted(set(read_index(found).values()))
        files = find_files(name, shards, **hub)
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        arrays.update(_read_msgpack(file))
    source = Source(str(found.parent))
    spelt = {path: other_spelling(path, arrays) for path in paths}
    source.held = {path: _array(arrays[n]) for path, n in spelt.items() if n in arrays}
    source.unused = sorted(set(arrays) - set(spelt.values()))
    return source


def _array(array: np.ndarray, change: Callable[[np.ndarray], np.ndarray] | None = None) -> Stored:
    array = array if change is None else change(array)
    return Stored(tuple(array.shape), str(array.dtype), lambda: array)


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    from flax.serialization import msgpack_restore

    try:
        tree = msgpack_restore(path.read_bytes())
        arrays = flat(tree)
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is no Flax msgpack checkpoint: {reason}. Download or save it again.") from error
    if not arrays or not all(isinstance(v, np.ndarray) for v in arrays.values()):
        raise CheckpointError(f"{path} does not hold a tree of arrays. Download or save it again.")
    return arrays


def is_orbax(name: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that Orbax wrote."""
    folder = Path(name)
    return (
        folder.is_dir() and not (folder / "config.json").is_file() and any((folder / m).exists() for m in ORBAX_MARKS)
    )


def _read_orbax(folder: Path) -> dict[str, np.ndarray]:
    """name -> array, the leading "transformer/" of older releases taken off."""
    import orbax.checkpoint as ocp

    reader = ocp.PyTreeCheckpointer()
    try:
        tree = reader.restore(folder.absolute())
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder} is no Orbax checkpoint that can be read: {reason}") from error
    while set(tree) == {"params"}:
        tree = tree["params"]
    return {name.removeprefix("transformer/"): np.asarray(array) for name, array in flat(tree).items()}


def _from_arrays(where: str, arrays: Mapping[str, np.ndarray], paths: list[str], config: GemmaConfig) -> Source:
    source, used = Source(where), set()
    for path in paths:
        for name, change in orbax_names(path):
            if name in arrays:
                used.add(name)
                source.held[path] = _array(_settled(name, arrays[name], config), change)
    source.unused = sorted(set(arrays) - used)
    return source


def _settled(name: str, array: np.ndarray, config: GemmaConfig) -> np.ndarray:
    """The two things releases differ in: unused rows after the vocabulary, and the gating weight's orientation."""
    if name == "embedder/input_embedding":
        return array[: config.vocab_size]
    if name.startswith("layer_") and "gating_einsum" in name:
        wide, deep = config.intermediate_size, config.hidden_size
        return array.swapaxes(1, 2) if array.shape[1:] == (wide, deep) and wide != deep else array
    return array


def orbax_config(folder: Path) -> GemmaConfig:
    """The configuration of an Orbax checkpoint, which comes without one: from the shapes of its arrays."""
    arrays = _read_orbax(folder)
    layers = {name.split("/")[0] for name in arrays if name.startswith("layer_")}
    try:
        vocabulary, hidden = arrays["embedder/input_embedding"].shape
        heads, head_dim, _ = arrays["layer_0/attn/attn_vec_einsum/w"].shape
        kv = arrays.get("layer_0/attn/kv_einsum/w")
        linear = arrays.get("layer_0/mlp/linear", arrays.get("layer_0/mlp/linear/w"))
        assert linear is not None
    except (KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{folder} holds no Gemma: it has {', '.join(sorted(arrays)[:4])}, ...") from error
    # Google's tables are padded to a multiple of 128 rows; the released vocabulary has 256000 ids.
    return GemmaConfig(
        vocab_size=256000 if vocabulary == 256128 else vocabulary,
        hidden_size=hidden,
        intermediate_size=linear.shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=heads if kv is None else kv.shape[1],
        head_dim=head_dim,
    )


def is_head(path: str) -> bool:
    return path.startswith(HEADS)
