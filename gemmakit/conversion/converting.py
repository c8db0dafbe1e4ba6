"""`convert_checkpoint`: one source, one target, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from gemmakit.checkpoint import Checkpoint, LazyTensor, parse_size, require_memory, save, save_checkpoint
from gemmakit.checkpoint.arrays import BITS, as_bytes
from gemmakit.checkpoint.formats import GGUF, MSGPACK, SAFETENSORS, msgpack
from gemmakit.checkpoint.formats.msgpack import MsgpackFile
from gemmakit.checkpoint.save import save_shards
from gemmakit.config import GemmaConfig
from gemmakit.conversion.sources import Source, open_source, vocabulary
from gemmakit.dtypes import dtype_name
from gemmakit.errors import InputError
from gemmakit.hub import HubOptions, Name

DTYPES = ("float32", "bfloat16", "float16")
Progress = Callable[[int, int], None]


def convert_checkpoint(
    source: Name,
    target: Name,
    *,
    to: str | None = None,
    type: str | None = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    config: GemmaConfig | Name | None = None,
    model_size: str | None = None,
    tokenizer: Name | None = None,
    keep_quantized: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Name | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> list[Path]:
    """Convert a checkpoint of any kind to safetensors, Flax msgpack or GGUF, a tensor at a time; the weight files.

    Args:
        source: a folder or a Hub id of safetensors or msgpack; a .safetensors, .msgpack or .gguf file; Google's .ckpt
            or another file of torch.save, by its own name; a folder that google-deepmind/gemma wrote with Orbax.
        target: the folder to write, or a .gguf file.
        to: "safetensors" (the default), "msgpack" or "gguf" (the default where `target` ends so).
        type: of a GGUF file: "F32", "F16", "BF16", "Q8_0", "Q5_0" or "Q4_0"; by default the stored dtype.
        dtype: "float32", "bfloat16" or "float16"; by default tensors keep their bits.
        max_shard_size: bytes a file, as a number or "5GB", "200MB".
        config: a GemmaConfig, or where its config.json lies, for weights that come without one; those of the released
            sizes and Orbax folders need none.
        model_size: "2B" or "7B": refuse anything else.
        tokenizer: a tokenizer.model or a folder, instead of the one beside the weights.
        keep_quantized: of a GGUF file, keep Q8_0, Q5_0 or Q4_0 as gemmakit's own int8, int5 or int4 in groups of 32,
            bit for bit.
        allow_pickle: read a pickle that was found in a folder; one that `source` names is read in any case. Always
            with torch's weights_only.
        overwrite: replace a checkpoint that `target` holds; it stays whole until the new one is.
        progress: called with (bytes done, bytes in all) after each tensor.
        revision, token, cache_dir, local_files_only, subfolder: of a Hub id.

    Every tensor is checked against the configuration before one is written. Peak memory is about the largest tensor:
    mapped files are read through, not loaded. config.json, generation_config.json and the tokenizer's files go along.

    Raises:
        CheckpointError: files missing, damaged, or with tensors missing, left over or misshapen; a full disk.
        UnsafeFile: a pickle not asked for, or one with more than tensors in it.
        InputError: options that contradict each other, or a target that is there already.
        ConfigError, TokenizerError, HubError, NotEnoughMemory, MissingDependency.
    """
    out = Path(target).expanduser()
    kind = target_kind(out, to, type)
    wanted = _dtype(dtype)
    shard_bytes = parse_size(max_shard_size)
    require_free(out, kind, overwrite)
    found = open_source(
        source,
        config=config,
        model_size=model_size,
        tokenizer=tokenizer,
        dtype=wanted,
        keep_quantized=keep_quantized,
        allow_pickle=allow_pickle,
        hub=HubOptions(revision, token, cache_dir, local_files_only, subfolder),
    )
    with found.checkpoint:
        _refuse_quantized(found, kind, wanted)
        if found.kind == GGUF:
            wanted = wanted or found.config.dtype  # its norms are float32 whatever the matrices are
        tensors = plan(found, wanted, progress)
        if found.quantized is None:
            found.config.dtype = stored_dtype(tensors) or found.config.dtype
        _require_memory(found, kind, tensors)
        type_ = gguf_kind(type, found.config.dtype) if kind == GGUF else None
        return TARGETS[kind](Order(out, found, tensors, shard_bytes, type_))


def plan(source: Source, dtype: str | None, progress: Progress | None) -> dict[str, LazyTensor]:
    """name -> what to write, each made when its turn comes."""
    checkpoint, made = source.checkpoint, {}
    for name in source.names:
        info = checkpoint.info(name)
        cast = dtype is not None and info.dtype in (*DTYPES, "float64") and not name.endswith("_scale")
        new = dtype if cast and dtype is not None else info.dtype
        made[name] = LazyTensor(new, tuple(info.shape), partial(_load, checkpoint, name, new))
    return made if progress is None else _watched(made, progress)


def _load(checkpoint: Checkpoint, name: str, dtype: str) -> Any:
    """The tensor in row-major order: the mapped bytes themselves where dtype and order are kept, else one copy."""
    import torch

    wanted, (file, stored) = getattr(torch, dtype), checkpoint.place(name)
    pieces = file.pieces(stored) if isinstance(file, MsgpackFile) else None
    if pieces is not None:
        out = torch.empty(sum(map(len, pieces)), dtype=wanted)
        for part, made in zip(out.split([len(piece) for piece in pieces]), pieces, strict=True):
            part.copy_(made)
        return out.view(tuple(checkpoint.info(name).shape))
    tensor = checkpoint.tensor(name)
    if tensor.dtype == wanted and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=wanted).copy_(tensor)


def _require_memory(source: Source, kind: str, tensors: dict[str, LazyTensor]) -> None:
    """Room for the largest tensor that is not written as it is mapped. Raises NotEnoughMemory."""
    copied = [
        prod(tensor.shape) * BITS[tensor.dtype] // 8
        for name, tensor in tensors.items()
        if kind == MSGPACK or source.kind == MSGPACK or tensor.dtype != source.checkpoint.info(name).dtype
    ]
    require_memory(max(copied, default=0), f"The largest tensor of {source.where}", remedy="Close other programs.")


def _watched(tensors: dict[str, LazyTensor], progress: Progress) -> dict[str, LazyTensor]:
    sizes = {name: prod(t.shape) * BITS[t.dtype] // 8 for name, t in tensors.items()}
    total, done = sum(sizes.values()), 0

    def load(name: str, inner: Callable[[], Any]) -> Any:
        nonlocal done
        made = inner()
        done += sizes[name]
        progress(done, total)
        return made

    return {name: LazyTensor(t.dtype, t.shape, partial(load, name, t.load)) for name, t in tensors.items()}


def stored_dtype(tensors: dict[str, LazyTensor]) -> str | None:
    """The floating dtype that most numbers have; None where none is of one."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.dtype in DTYPES:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + prod(tensor.shape)
    return max(sizes, key=lambda name: sizes[name], default=None)


def _dtype(dtype: Any) -> str | None:
    name = None if dtype is None else dtype_name(dtype)
    if name in (None, "auto"):
        return None
    if name not in DTYPES:
        raise InputError(
            f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or left out to keep the stored one."
        )
    return name


def _refuse_quantized(source: Source, kind: str, dtype: str | None) -> None:
    """Codes can be copied, and gemmakit's own written as GGUF; they are not numbers to be cast."""
    kinds = (SAFETENSORS, GGUF) if source.quantized == "gemmakit" else (SAFETENSORS,)
    if source.quantized is not None and (kind not in kinds or dtype is not None):
        raise InputError(
            f"{source.where} holds weights that {source.quantized} quantized: they can be written as "
            f"{' or '.join(kinds)}, but not in another dtype or format. Convert the checkpoint they were made from."
        )


# -- what comes out: a folder of safetensors, a folder of Flax msgpack, or one GGUF file -------------------------------

# Which GGUF type keeps a dtype as it is, and those that take fewer bits.
GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
GGUF_QUANTIZED = ("Q8_0", "Q5_0", "Q4_0")
# How the weight files of each kind end.
_ENDINGS = {
    SAFETENSORS: (".safetensors", ".safetensors.index.json"),
    MSGPACK: (".msgpack", ".msgpack.index.json"),
    "pickle": (".bin", ".bin.index.json", ".ckpt", ".pt", ".pth"),
    GGUF: (".gguf",),
}


@dataclass(frozen=True)
class Order:
    """What to write where: bytes a file at most, and the type of a GGUF file."""

    out: Path
    source: Source
    tensors: Mapping[str, LazyTensor]
    shard_bytes: int
    gguf_type: str | None

    @property
    def files(self) -> dict[str, bytes]:
        """The small files of a folder."""
        return {"config.json": self.source.config.to_json_string().encode(), **self.source.files}


def target_kind(out: Path, to: str | None, type: str | None) -> str:
    """Which of the three to write; InputError where name and options disagree."""
    named = GGUF if out.suffix.lower() == ".gguf" else None
    kind = to or named or (GGUF if type is not None else SAFETENSORS)
    if kind not in TARGETS:
        raise InputError(f"to is {to!r}; it must be one of {', '.join(TARGETS)}.")
    if kind == GGUF and named is None:
        raise InputError(f"{str(out)!r} is no name for a GGUF file: let it end with .gguf.")
    if kind != GGUF and named is not None:
        raise InputError(f"{str(out)!r} is the name of a GGUF file, but {kind} is written into a folder.")
    if type is not None:
        if kind != GGUF:
            raise InputError(
                f"type is {type!r}, which only a GGUF file has; give dtype, or a target ending with .gguf."
            )
        gguf_kind(type, None)
    return kind


def gguf_kind(type: str | None, dtype: str | None) -> str:
    """The type of a GGUF file's matrices: what was said, else what keeps the stored dtype."""
    if type is None:
        return GGUF_TYPES[dtype or "float16"]
    if type.upper() not in (*GGUF_TYPES.values(), *GGUF_QUANTIZED):
        names = ", ".join((*GGUF_TYPES.values(), *GGUF_QUANTIZED))
        raise InputError(f"type is {type!r}; it must be one of {names}.")
    return type.upper()


def require_free(out: Path, kind: str, overwrite: bool) -> None:
    """InputError where something would be overwritten, or where readers would prefer what is there already."""
    if kind == GGUF:
        if out.is_dir():
            raise InputError(f"{out} is a folder; name a file that ends with .gguf.")
        if out.exists() and not overwrite:
            raise InputError(f"{out} exists. Pass --overwrite (overwrite=True) to replace it.")
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; a checkpoint is written into a folder.")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    others = [n for other, ends in _ENDINGS.items() if other != kind for n in names if n.endswith(ends)]
    if others:
        raise InputError(f"{out} holds {others[0]}, weights of another kind: convert into another folder.")
    own = [n for n in names if n.endswith(_ENDINGS[kind]) or n == "config.json"]
    if own and not overwrite:
        raise InputError(
            f"{out} holds a checkpoint already ({own[0]}). Pass --overwrite (overwrite=True) to replace it."
        )


# -- safetensors -------------------------------------------------------------------------------------------------------


def _write_safetensors(order: Order) -> list[Path]:
    return save_checkpoint(order.tensors, order.out, max_shard_size=order.shard_bytes, extra_files=order.files)


# -- msgpack -----------------------------------------------------------------------------------------------------------


def _write_msgpack(order: Order) -> list[Path]:
    return save_shards(order.out, save.MSGPACK, _leaves(order.tensors), msgpack.encode, order.shard_bytes, order.files)


def _leaves(tensors: Mapping[str, LazyTensor]) -> dict[str, msgpack.Leaf]:
    leaves: dict[str, msgpack.Leaf] = {}
    for name, tensor in tensors.items():
        path, transposed = msgpack.flax_path(name)
        transposed = transposed and len(tensor.shape) == 2
        shape = tensor.shape[::-1] if transposed else tensor.shape
        leaves[path] = msgpack.Leaf(tensor.dtype, shape, partial(_data, tensor, transposed))
    return leaves


def _data(tensor: LazyTensor, transposed: bool) -> memoryview:
    made = tensor.load()
    return as_bytes(made.t() if transposed else made)


# -- GGUF --------------------------------------------------------------------------------------------------------------


def _write_gguf(order: Order) -> list[Path]:
    from gemmakit.checkpoint.formats.gguf_writing import write_gguf

    tokenizer = order.source.tokenizer
    if tokenizer is None:
        raise InputError(
            f"{order.source.where} has no tokenizer beside it, and a GGUF file holds one: name it with "
            "--tokenizer_checkpoint (tokenizer=), a tokenizer.model or a folder."
        )
    assert order.gguf_type is not None
    write_gguf(order.out, order.source.config, dict(order.tensors), vocabulary(tokenizer), order.gguf_type)
    return [order.out]


TARGETS: dict[str, Callable[[Order], list[Path]]] = {
    SAFETENSORS: _write_safetensors,
    MSGPACK: _write_msgpack,
    GGUF: _write_gguf,
}
