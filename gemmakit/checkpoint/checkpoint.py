"""A checkpoint as named arrays: one file, or shards and the index that says which of them holds which tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from gemmakit.checkpoint.arrays import TensorInfo, as_bytes
from gemmakit.checkpoint.formats import LAYOUTS, PICKLE, File, Layout, format_of, google, msgpack, orbax, safetensors
from gemmakit.errors import CheckpointError, HubError, UnsafeFile
from gemmakit.hub import (
    DEFAULT,
    HubOptions,
    Name,
    check_relative,
    commit_of,
    find_file,
    find_files,
    list_files,
    local_directory,
    packaged_model,
)

# Bytes that are compared at a time.
_STEP = 16 << 20
INDEX_LIMIT_BYTES = 100_000_000
_VARIANT = re.compile(r"[A-Za-z0-9_.-]+")


class Checkpoint:
    """The tensors of one checkpoint by name, in the order of the files. Nothing but headers is read until asked for.

    Of a model of text and images only the text is here, under the names of a model of text; `left_out` names the rest.
    Iterating gives names. `files` are the paths read, `where` is their folder, `metadata` is that of the first file,
    `total_bytes` the size of all tensors. Also a context manager; tensors that were handed out stay valid after it.
    Raises CheckpointError where two tensors have one name, or no text is there.
    """

    def __init__(self, files: list[File]):
        self._holder: dict[str, tuple[File, str]] = {}
        self.left_out: list[str] = []
        for file in files:
            for stored in file.tensors:
                name = text_name(stored)
                if name is None:
                    self.left_out.append(stored)
                elif name in self._holder:
                    raise CheckpointError(f"Tensor {name!r} is in {self._holder[name][0].path} and in {file.path}.")
                else:
                    self._holder[name] = file, stored
        if self.left_out and not self._holder:
            raise CheckpointError(
                f"{files[0].path} holds only what a model sees images with ({len(self.left_out)} tensors, first "
                f"{self.left_out[0]!r}): gemmakit runs the text part of Gemma 3, which is not here."
            )
        self._files = files
        self.kind = files[0].kind
        self.files: list[Path] = [file.path for file in files]
        self.where: Path = files[0].path if files[0].path.is_dir() else files[0].path.parent
        self.metadata: Mapping[str, str] = MappingProxyType(dict(files[0].metadata))
        self.total_bytes: int = sum(file.tensors[stored].nbytes for file, stored in self._holder.values())

    def rename(self, names: Mapping[str, str]) -> None:
        """Let tensors answer to other names: other name -> the name here."""
        for name, held in names.items():
            if name != held:
                self._holder[name] = self._holder.pop(held)

    def names(self) -> list[str]:
        """The tensors' names in the order of the files."""
        return list(self._holder)

    def info(self, name: str) -> TensorInfo:
        """dtype ("bfloat16"), shape and nbytes of a tensor, without reading it."""
        file, stored = self.place(name)
        return file.tensors[stored]

    def tensor(self, name: str, framework: str = "pt", device: Any = "cpu") -> Any:
        """One tensor, of its stored dtype and shape.

        framework "pt": a torch.Tensor on `device`; on the CPU it is a private view of the mapped file: it takes no
        memory until it is written to, and writing to it never changes the file.
        framework "np": a numpy array, the same kind of view (bfloat16 and float8 need the package ml_dtypes).
        framework "flax": a jax.Array. Raises CheckpointError for a name that is not there.
        """
        if framework not in ("pt", "np", "flax"):
            raise ValueError(f"framework must be 'pt', 'np' or 'flax', found {framework!r}.")
        file, stored = self.place(name)
        return file.tensor(stored, framework, device)

    def columns(self, name: str, start: int, stop: int) -> Any:
        """Columns [start, stop) of a matrix, as a torch.Tensor on the CPU in memory of its own.

        Of a safetensors file only their bytes are read. Raises CheckpointError for a name that is not there.
        """
        file, stored = self.place(name)
        if isinstance(file, safetensors.SafetensorsFile):
            return file.columns(stored, start, stop)
        return file.tensor(stored, "pt", "cpu")[:, start:stop].contiguous()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the files."""
        return {name: tuple(self.info(name).shape) for name in self._holder}

    def equal(self, one: str, other: str, framework: str = "pt") -> bool:
        """Whether two tensors are the same, bit for bit."""
        infos = [(info.dtype, tuple(info.shape)) for info in map(self.info, (one, other))]
        if infos[0] != infos[1]:
            return False
        a, b = (as_bytes(self.tensor(name, framework)) for name in (one, other))
        return all(bytes(a[i : i + _STEP]) == bytes(b[i : i + _STEP]) for i in range(0, len(a), _STEP))

    def items(self, framework: str = "pt", device: Any = "cpu") -> Iterator[tuple[str, Any]]:
        """(name, tensor) one at a time, in the order of the files."""
        for name in self._holder:
            yield name, self.tensor(name, framework, device)

    def close(self) -> None:
        """Let go of the open files; the tensors handed out keep their own hold on the mapping."""
        for file in self._files:
            file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._holder)

    def __len__(self) -> int:
        return len(self._holder)

    def __contains__(self, name: object) -> bool:
        return name in self._holder

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def place(self, name: str) -> tuple[File, str]:
        """The file that holds a tensor, and its name there. Raises CheckpointError for a name that is not here."""
        try:
            return self._holder[name]
        except KeyError:
            held = ", ".join(list(self._holder)[:3])
            raise CheckpointError(
                f"No tensor {name!r} among the {len(self)} of {self.files[0]} ({held}, ...)."
            ) from None


# Where models of text and images have their text -> where a model of text has it; and what only images need.
_TEXT = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
_IMAGES = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
    "model.embed_vision.", "model.audio_tower.", "model.embed_audio.",
    *google.IMAGES, *orbax.IMAGES,
)  # fmt: skip


def text_name(name: str) -> str | None:
    """A tensor's name in a model of text; None for one of the images'."""
    if name.startswith(_IMAGES):
        return None
    return next((own + name[len(theirs) :] for theirs, own in _TEXT.items() if name.startswith(theirs)), name)


def open_checkpoint(
    name_or_path: Name,
    hub: HubOptions = DEFAULT,
    *,
    allow_pickle: bool = False,
    variant: str | None = None,
    vocab_size: int | None = None,
) -> Checkpoint:
    """Open a checkpoint of any kind under the PyTorch layout's names; check headers and index, read no tensor.

    name_or_path: a file (.safetensors, .gguf, .msgpack, and with `allow_pickle` .ckpt, .bin, .pt), an index, a folder
    or a Hub id. Where it is no file, nor a folder that Orbax wrote, are looked for, in this order: model.safetensors,
    or its index and shards; flax_model.msgpack, or its; with `allow_pickle` pytorch_model.bin (read by torch with
    weights_only), or its; and in a folder without any of these one .gguf or .ckpt. The blocks of a GGUF file are given
    as float32.
    variant: "fp16" means model.fp16.safetensors. vocab_size: rows of an Orbax embedding that are used, as it is padded.
    Raises UnsafeFile (pickles not asked for, shard names that leave the folder), CheckpointError (missing, truncated or
    inconsistent files), HubError, MissingDependency.
    """
    path = packaged_model(name_or_path) or Path(name_or_path).expanduser()
    if path.is_file():
        return _open_file(path, path.parent, DEFAULT, allow_pickle)
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise UnsafeFile(f"variant must be letters, digits, '.', '_' or '-', found {variant!r}.")
    inner = check_relative(hub.subfolder.rstrip("/")) if hub.subfolder else ""
    folder = None if local_directory(name_or_path) is None else path / inner
    if folder is not None and orbax.is_orbax(folder):
        return Checkpoint([orbax.OrbaxFile(folder, vocab_size)])
    layouts = [layout.of(variant) for kind, layout in LAYOUTS.items() if allow_pickle or kind != PICKLE]
    for name in (name for layout in layouts for name in (layout.single, layout.index)):
        found = find_file(name_or_path, name, hub, optional=True)
        if found is not None:
            return _open_file(found, name_or_path, hub, allow_pickle)
    only = None if folder is None or variant else _only_file(folder, allow_pickle)
    if only is None:
        raise _nothing_found(name_or_path, layouts[0], hub)
    return _open_file(only, name_or_path, hub, allow_pickle)


def _open_file(path: Path, name_or_path: Name, hub: HubOptions, allow_pickle: bool) -> Checkpoint:
    """One file, or the shards that one index of this folder or id names."""
    if path.name.endswith(google.SUFFIXES) and not allow_pickle:
        raise _pickle_refused(str(path))
    if ".index." not in path.name or path.suffix != ".json":
        return Checkpoint([_open_one(path)])
    weight_map = _read_weight_map(path, allow_pickle)
    names = list(dict.fromkeys(weight_map.values()))
    # Shards of the very commit the index came from, even if the branch moves on meanwhile.
    shards = find_files(name_or_path, names, replace(hub, revision=commit_of(path) or hub.revision))
    files = [_open_one(shard) for shard in shards]
    check_index(path, weight_map, {name: file.tensors for name, file in zip(names, files, strict=True)})
    return Checkpoint(files)


def _open_one(path: Path) -> File:
    format = format_of(path)
    if format is None:
        raise CheckpointError(
            f"{path} is no checkpoint by its name. Known are .safetensors, .gguf, .msgpack, .ckpt, .bin and .pt files, "
            "an .index.json of shards, and folders."
        )
    return format.open(path)


def _read_weight_map(index: Path, allow_pickle: bool) -> dict[str, str]:
    """The weight map, in the PyTorch layout's names; an index cannot bring in a pickle that was not asked for."""
    weight_map = read_index(index)
    for name in dict.fromkeys(weight_map.values()):
        if name.endswith(google.SUFFIXES) and not allow_pickle:
            raise _pickle_refused(f"{name}, which {index} names,")
        if not name.endswith((".safetensors", ".msgpack", *google.SUFFIXES)):
            raise UnsafeFile(f"{index} names {name!r}, which is no weights file. Do not use this checkpoint.")
    return {
        msgpack.pytorch_name(name)[0] if shard.endswith(".msgpack") else name: shard
        for name, shard in weight_map.items()
    }


def _only_file(folder: Path, allow_pickle: bool) -> Path | None:
    """The one GGUF file or Google's .ckpt of a folder without other weights; None where there is neither."""
    pickled = LAYOUTS[PICKLE]
    if not folder.is_dir() or (folder / pickled.single).exists() or (folder / pickled.index).exists():
        return None
    for ending in (".gguf", ".ckpt"):
        found = sorted(path for path in folder.iterdir() if path.name.endswith(ending))
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


def _nothing_found(name_or_path: Name, looked_for: Layout, hub: HubOptions) -> CheckpointError:
    held = _neighbours(name_or_path, hub)
    name = "/".join(part for part in (str(name_or_path), hub.subfolder) if part)
    pickled = LAYOUTS[PICKLE]
    if pickled.single in held or pickled.index in held:
        return _pickle_refused(f"{name}/{pickled.single}")
    message = (
        f"{name!r} has neither {looked_for.single} nor {looked_for.index}. "
        f"It holds: {', '.join(held[:12]) or 'nothing that could be listed'}. Check name, revision and subfolder."
    )
    return (CheckpointError if local_directory(name_or_path) is not None else HubError)(message)


def _neighbours(name_or_path: Name, hub: HubOptions) -> list[str]:
    """The files beside where the weights should be, for an error message; empty if they cannot be listed."""
    subfolder = check_relative(hub.subfolder.rstrip("/")) if hub.subfolder else ""
    directory = local_directory(name_or_path)
    try:
        if directory is not None:
            return sorted(path.name for path in (directory / subfolder).iterdir())
        held = list_files(name_or_path, hub)
    except OSError:
        return []
    prefix = f"{subfolder}/" if subfolder else ""
    return [file[len(prefix) :] for file in held if file.startswith(prefix)]


def _pickle_refused(name: str) -> UnsafeFile:
    return UnsafeFile(
        f"{name} is a pickle file, which can run code when it is read. Use a safetensors copy of the model, "
        "or pass allow_pickle=True if you trust its author (it is then read by torch with weights_only=True)."
    )


# -- the index of shards -----------------------------------------------------------------------------------------------


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index file, tensor name -> shard name, every shard name checked to stay in its folder.

    `metadata.total_size` is not checked: released checkpoints have wrong ones.
    Raises CheckpointError (not an index) or UnsafeFile (a shard name with `..` or the like), before any shard is read.
    """
    size = path.stat().st_size
    if size > INDEX_LIMIT_BYTES:
        raise CheckpointError(f"{path} has {size} bytes; an index has at most {INDEX_LIMIT_BYTES}. It is damaged.")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint index: {error}. Download or save it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is not a checkpoint index: it has no 'weight_map'. Download or save it again.")
    for shard in dict.fromkeys(_texts(path, weight_map)):
        check_relative(shard)
    return weight_map


def check_index(index: Path, weight_map: Mapping[str, str], held: Mapping[str, Mapping[str, Any]]) -> None:
    """CheckpointError unless index and shards agree on every tensor; `held` is shard name -> what that shard holds."""
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise CheckpointError(
                f"{index.name} says that {shard} holds tensor {name!r}, but the shard has {len(held[shard])} tensors "
                "and not this one. Download or save the checkpoint again."
            )
    for shard, names in held.items():
        extra = [name for name in names if weight_map.get(name) != shard]
        if extra:
            raise CheckpointError(
                f"{shard} holds {len(extra)} tensors that {index.name} does not place there, first {extra[0]!r}. "
                "Shards of two checkpoints are mixed: download or save the checkpoint again."
            )


def _texts(path: Path, weight_map: dict[str, Any]) -> list[str]:
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{path} gives tensor {name!r} the shard {shard!r}, which is not a file name.")
    return list(weight_map.values())


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
