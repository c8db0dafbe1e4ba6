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
from gemmakit.checkpoint.formats import File, format_of, google, safetensors
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
)

# Bytes that are compared at a time.
_STEP = 16 << 20
INDEX_LIMIT_BYTES = 100_000_000
_VARIANT = re.compile(r"[A-Za-z0-9_.-]+")


class Checkpoint:
    """The tensors of one checkpoint by name, in the order of the files. Nothing but headers is read until asked for.

    Iterating gives names. `files` are the paths read, `where` is their folder, `metadata` is that of the first file,
    `total_bytes` the size of all tensors. Also a context manager; tensors that were handed out stay valid after it.
    """

    def __init__(self, files: list[File]):
        self._holder: dict[str, File] = {}
        for file in files:
            for name in file.tensors:
                if name in self._holder:
                    raise CheckpointError(f"Tensor {name!r} is in {self._holder[name].path} and in {file.path}.")
                self._holder[name] = file
        self._files = files
        self.kind = files[0].kind
        self.files: list[Path] = [file.path for file in files]
        self.where: Path = files[0].path if files[0].path.is_dir() else files[0].path.parent
        self.metadata: Mapping[str, str] = MappingProxyType(dict(files[0].metadata))
        self.total_bytes: int = sum(info.nbytes for file in files for info in file.tensors.values())

    def names(self) -> list[str]:
        """The tensors' names in the order of the files."""
        return list(self._holder)

    def info(self, name: str) -> TensorInfo:
        """dtype ("bfloat16"), shape and nbytes of a tensor, without reading it."""
        return self._file(name).tensors[name]

    def tensor(self, name: str, framework: str = "pt", device: Any = "cpu") -> Any:
        """One tensor, of its stored dtype and shape.

        framework "pt": a torch.Tensor on `device`; on the CPU it is a private view of the mapped file: it takes no
        memory until it is written to, and writing to it never changes the file.
        framework "np": a numpy array, the same kind of view (bfloat16 and float8 need the package ml_dtypes).
        framework "flax": a jax.Array. Raises CheckpointError for a name that is not there.
        """
        if framework not in ("pt", "np", "flax"):
            raise ValueError(f"framework must be 'pt', 'np' or 'flax', found {framework!r}.")
        return self._file(name).tensor(name, framework, device)

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

    def _file(self, name: str) -> File:
        try:
            return self._holder[name]
        except KeyError:
            held = ", ".join(list(self._holder)[:3])
            raise CheckpointError(
                f"No tensor {name!r} among the {len(self)} of {self.files[0]} ({held}, ...)."
            ) from None


def open_checkpoint(
    name_or_path: Name, hub: HubOptions = DEFAULT, *, allow_pickle: bool = False, variant: str | None = None
) -> Checkpoint:
    """Open the checkpoint in a directory, in one file or behind a Hub id; check headers and index; read no tensor.

    A GGUF file is opened where it is named itself; its blocks are then given as float32. In a directory or behind an id
    are looked for, in this order: model.safetensors, model.safetensors.index.json and its shards, and where pickles are
    allowed pytorch_model.bin and its index (read by torch with weights_only). `variant="fp16"` means
    model.fp16.safetensors.
    Raises UnsafeFile (pickles not asked for, shard names that leave the folder), CheckpointError (missing, truncated or
    inconsistent files), HubError.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return _open_file(path, allow_pickle)
    stem = _stem("model", "safetensors", variant)
    for single, index in (stem, _stem("pytorch_model", "bin", variant))[: 2 if allow_pickle else 1]:
        found = _open_layout(name_or_path, single, index, hub, allow_pickle)
        if found is not None:
            return found
    raise _nothing_found(name_or_path, stem, hub)


def _stem(name: str, suffix: str, variant: str | None) -> tuple[str, str]:
    """The names of the single file and of the index."""
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise UnsafeFile(f"variant must be letters, digits, '.', '_' or '-', found {variant!r}.")
    dot = f".{variant}" if variant else ""
    return f"{name}{dot}.{suffix}", f"{name}.{suffix}.index{dot}.json"


def _open_layout(name_or_path: Name, single: str, index: str, hub: HubOptions, allow_pickle: bool) -> Checkpoint | None:
    path = find_file(name_or_path, single, hub, optional=True)
    if path is not None:
        return Checkpoint([_open_one(path)])
    path = find_file(name_or_path, index, hub, optional=True)
    if path is None:
        return None
    weight_map, names = _read_weight_map(path, allow_pickle)
    # Shards of the very commit the index came from, even if the branch moves on meanwhile.
    shards = find_files(name_or_path, names, replace(hub, revision=commit_of(path) or hub.revision))
    return _open_shards(path, weight_map, names, shards)


def _read_weight_map(index: Path, allow_pickle: bool) -> tuple[dict[str, str], list[str]]:
    """The weight map and its shard names; an index cannot bring in a pickle that was not asked for."""
    weight_map = read_index(index)
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        if name.endswith(google.SUFFIXES) and not allow_pickle:
            raise _pickle_refused(f"{name}, which {index} names,")
        if not name.endswith((".safetensors", *google.SUFFIXES)):
            raise UnsafeFile(f"{index} names {name!r}, which is no weights file. Do not use this checkpoint.")
    return weight_map, names


def _open_shards(index: Path, weight_map: dict[str, str], names: list[str], paths: list[Path]) -> Checkpoint:
    files = [_open_one(path) for path in paths]
    check_index(index, weight_map, {name: file.tensors for name, file in zip(names, files, strict=True)})
    return Checkpoint(files)


def _open_file(path: Path, allow_pickle: bool) -> Checkpoint:
    if path.name.endswith(google.SUFFIXES) and not allow_pickle:
        raise _pickle_refused(str(path))
    if path.suffix != ".json":
        return Checkpoint([_open_one(path)])
    weight_map, names = _read_weight_map(path, allow_pickle)
    return _open_shards(path, weight_map, names, find_files(path.parent, names))


def _open_one(path: Path) -> File:
    return (format_of(path) or safetensors).open(path)


def _nothing_found(name_or_path: Name, looked_for: tuple[str, str], hub: HubOptions) -> CheckpointError:
    held = _neighbours(name_or_path, hub)
    name = "/".join(part for part in (str(name_or_path), hub.subfolder) if part)
    if any(file in ("pytorch_model.bin", "pytorch_model.bin.index.json") for file in held):
        return _pickle_refused(f"{name}/pytorch_model.bin")
    message = (
        f"{name!r} has neither {looked_for[0]} nor {looked_for[1]}. "
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
