"""What kind of checkpoint a name means, and opening each as named arrays of the PyTorch layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gemmakit.checkpoint import save
from gemmakit.checkpoint.checkpoint import Checkpoint, check_index, open_checkpoint, read_index
from gemmakit.checkpoint.formats import MSGPACK, ORBAX, PICKLE, SAFETENSORS, format_of, msgpack, orbax
from gemmakit.errors import CheckpointError, UnsafeFile
from gemmakit.hub import DEFAULT, HubOptions, Name, commit_of, find_file, find_files, local_directory

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
    return Weights(checkpoint.kind, checkpoint)


def open_file(path: Path, allow_pickle: bool) -> Weights:
    """Open one file, or the shards of one index, by how its name ends."""
    if path.name.endswith(".msgpack.index.json"):
        return _open_msgpack(path.parent, path, DEFAULT)
    if format_of(path) is None and not path.name.endswith(".index.json"):
        raise CheckpointError(
            f"{path} is no checkpoint by its name. Known are .safetensors, .gguf, .msgpack, .ckpt, .bin and .pt files, "
            "an .index.json of shards, and folders."
        )
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    return Weights(checkpoint.kind, checkpoint)


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
