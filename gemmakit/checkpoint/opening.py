"""What kind of checkpoint a name means, and opening each as named arrays of the PyTorch layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gemmakit.checkpoint import save
from gemmakit.checkpoint.arrays import TensorInfo
from gemmakit.checkpoint.checkpoint import PICKLE_SUFFIXES, Checkpoint, check_index, open_checkpoint, read_index
from gemmakit.checkpoint.formats import google, msgpack, orbax
from gemmakit.checkpoint.formats.safetensors import SafetensorsFile
from gemmakit.errors import CheckpointError, UnsafeFile
from gemmakit.hub import DEFAULT, HubOptions, Name, commit_of, find_file, find_files, local_directory

SAFETENSORS, PICKLE, GOOGLE, MSGPACK, ORBAX, GGUF = "safetensors", "pickle", "google", "msgpack", "orbax", "gguf"
# what to call each in a report
TITLES = {
    SAFETENSORS: "safetensors",
    PICKLE: "PyTorch pickle",
    GOOGLE: "Google's PyTorch release",
    MSGPACK: "Flax msgpack",
    ORBAX: "Orbax, as google-deepmind/gemma",
    GGUF: "GGUF",
}
_LAYOUTS = {
    SAFETENSORS: save.SAFETENSORS,
    MSGPACK: save.MSGPACK,
    PICKLE: save.Layout("pytorch_model.bin"),
}


class Weights(NamedTuple):
    """An opened checkpoint and what kind it was: one of the names above."""

    kind: str
    checkpoint: Checkpoint


def open_weights(
    name_or_path: Name,
    hub: HubOptions = DEFAULT,
    *,
    allow_pickle: bool = False,
    vocab_size: int | None = None,
    variant: str | None = None,
) -> Weights:
    """Open a checkpoint of any kind; headers are checked, no tensor is read. Names and shapes are the PyTorch layout's.

    name_or_path: a file (.safetensors, .gguf, .msgpack, and with `allow_pickle` .ckpt, .bin, .pt), an index, a folder
    or a Hub id. In a folder is looked for, in this order: safetensors, msgpack, one GGUF file, Orbax, and with
    `allow_pickle` pytorch_model.bin and one .ckpt.
    vocab_size: rows of an Orbax embedding that are used, which may be padded.
    Raises UnsafeFile, CheckpointError, HubError, MissingDependency.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return open_file(path, allow_pickle)
    folder = None if local_directory(name_or_path) is None else path / hub.subfolder
    if folder is not None and orbax.is_orbax(folder):
        return Weights(ORBAX, Checkpoint([orbax.OrbaxFile(folder, vocab_size)]))
    if not _held(name_or_path, SAFETENSORS, hub) or variant is not None:
        found = None if variant else _held(name_or_path, MSGPACK, hub)
        if found:
            return _open_msgpack(name_or_path, found, hub)
        single = _only_file(folder, allow_pickle) if folder is not None and variant is None else None
        if single is not None:
            return open_file(single, allow_pickle)
    checkpoint = open_checkpoint(name_or_path, hub, allow_pickle=allow_pickle, variant=variant)
    return Weights(_kind_of(checkpoint.files[0]), _in_pytorch_names(checkpoint))


def open_file(path: Path, allow_pickle: bool) -> Weights:
    """Open one file, or the shards of one index, by how its name ends."""
    name = path.name
    if name.endswith(".msgpack"):
        return Weights(MSGPACK, Checkpoint([msgpack.MsgpackFile(path)]))
    if name.endswith(".msgpack.index.json"):
        return _open_msgpack(path.parent, path, DEFAULT)
    if name.endswith(PICKLE_SUFFIXES) and allow_pickle:
        file = google.open_pickle(path)
        return Weights(GOOGLE if isinstance(file, google.GoogleFile) else PICKLE, Checkpoint([file]))
    if not name.endswith((*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".index.json")):
        raise CheckpointError(
            f"{path} is no checkpoint by its name. Known are .safetensors, .gguf, .msgpack, .ckpt, .bin and .pt files, "
            "an .index.json of shards, and folders."
        )
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    return Weights(_kind_of(checkpoint.files[0]), _in_pytorch_names(checkpoint))


def _kind_of(path: Path) -> str:
    if path.name.endswith(PICKLE_SUFFIXES):
        return PICKLE
    return GGUF if path.suffix == ".gguf" else SAFETENSORS


def _held(name: Name, kind: str, hub: HubOptions) -> Path | None:
    layout = _LAYOUTS[kind]
    found = find_file(name, layout.single, hub, optional=True)
    return found or find_file(name, layout.index, hub, optional=True)


def _only_file(folder: Path, allow_pickle: bool) -> Path | None:
    """The one GGUF file or Google's .ckpt of a folder without other weights; None where there is neither."""
    if any((folder / name).exists() for name in (_LAYOUTS[PICKLE].single, _LAYOUTS[PICKLE].index)):
        return None
    for ending in (".gguf", ".ckpt"):
        found = sorted(path for path in folder.iterdir() if path.name.endswith(ending)) if folder.is_dir() else []
        if len(found) > 1:
            raise CheckpointError(
                f"{folder} holds {len(found)} {ending} files: name the one you mean, {found[0]}, say."
            )
        if found and ending == ".ckpt" and not allow_pickle:
            raise UnsafeFile(
                f"{found[0]} is a pickle file, which can run code when it is read: name the file itself, or pass "
                "--allow-pickle (allow_pickle=True), if you trust its author. It is read with weights_only=True."
            )
        if found:
            return found[0]
    return None


def _open_msgpack(name: Name, found: Path, hub: HubOptions) -> Weights:
    if found.suffix != ".json":
        return Weights(MSGPACK, Checkpoint([msgpack.MsgpackFile(found)]))
    weight_map = read_index(found)
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        if not shard.endswith(".msgpack"):
            raise UnsafeFile(f"{found} names {shard!r}, which is no msgpack file. Do not use this checkpoint.")
    # Shards of the very commit the index came from, even if the branch moves on meanwhile.
    same = replace(hub, revision=commit_of(found) or hub.revision)
    files = [msgpack.MsgpackFile(path) for path in find_files(name, shards, same)]
    named = {msgpack.pytorch_name(path)[0]: shard for path, shard in weight_map.items()}
    check_index(found, named, {shard: file.tensors for shard, file in zip(shards, files, strict=True)})
    return Weights(MSGPACK, Checkpoint([*files]))


def _in_pytorch_names(checkpoint: Checkpoint) -> Checkpoint:
    """Safetensors as a Flax model wrote them have its names and kernels, with dots between."""
    if checkpoint.metadata.get("format") != "flax":
        return checkpoint
    return Checkpoint([_FlaxSafetensors(path) for path in checkpoint.files])


class _FlaxSafetensors:
    """A safetensors file of a Flax model in the PyTorch layout: kernels are transposed views."""

    def __init__(self, path: Path):
        self._file = SafetensorsFile(path)
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._places: dict[str, tuple[str, bool]] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        for name, info in self._file.tensors.items():
            new, transposed = msgpack.pytorch_name(name.replace(".", "/"))
            transposed = transposed and len(info.shape) == 2
            if new in self._places:
                raise CheckpointError(f"{path}: {self._places[new][0]!r} and {name!r} are both {new!r} in PyTorch.")
            self._places[new] = name, transposed
            shape = info.shape[::-1] if transposed else info.shape
            self.tensors[new] = TensorInfo(info.dtype, shape, info.begin, info.end)

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        stored, transposed = self._places[name]
        made = self._file.tensor(stored, framework, device)
        return made.T if transposed else made

    def close(self) -> None:
        self._file.close()
