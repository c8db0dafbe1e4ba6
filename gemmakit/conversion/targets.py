"""What comes out: a folder of safetensors, a folder of Flax msgpack, or one GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gemmakit.checkpoint import LazyTensor, save, save_checkpoint
from gemmakit.checkpoint.arrays import as_bytes
from gemmakit.checkpoint.formats import GGUF, MSGPACK, SAFETENSORS, msgpack
from gemmakit.checkpoint.save import save_shards
from gemmakit.conversion.sources import Source
from gemmakit.conversion.tokenizers import vocabulary
from gemmakit.errors import InputError

# Which GGUF type keeps a dtype as it is, and those that take fewer bits.
GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
GGUF_QUANTIZED = ("Q8_0", "Q4_0")
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
