"""A Gemma as one GGUF file that llama.cpp runs, written a few rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gemmakit.checkpoint.arrays import describe, made
from gemmakit.checkpoint.formats.gguf import BLOCK, gguf_name, is_norm, is_vector
from gemmakit.checkpoint.formats.gguf_blocks import five_bit_blocks
from gemmakit.checkpoint.formats.gguf_keys import FILE_TYPES, model_keys, own_rope_types, word_keys
from gemmakit.checkpoint.layout import tensor_shapes
from gemmakit.checkpoint.save import require_disk, saving_into, sync_directory, write
from gemmakit.config import GemmaConfig
from gemmakit.errors import ConfigError, InputError, MissingDependency
from gemmakit.family import FULL_ATTENTION
from gemmakit.gguf import TYPES, BlockType
from gemmakit.gguf_settings import (
    EMBEDDING,
    ROPE_FACTORS,
    STANDS_STILL,
    TABLE,
    Vocabulary,
)
from gemmakit.hub import Name
from gemmakit.quantization import BITS, stored_parts

_CHUNK_ELEMENTS = 1 << 20
_GROUPS = (32, 128)
_ALIGNMENT = 32
# A step of a block is stored in 16 bits: of Q8_0 a 127th of the largest number, of Q5_0 a 16th, of Q4_0 an eighth.
_LARGEST = {"F16": 65504.0, "Q8_0": 65504.0 * 127, "Q5_0": 65504.0 * 16, "Q4_0": 65504.0 * 8}


@dataclass(frozen=True)
class _Item:
    """A tensor to write: its name and type in the file, its shape, and its bytes, made a chunk at a time."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Any]]

    @property
    def nbytes(self) -> int:
        return self.kind.size(prod(self.shape))


def write_gguf(
    path: Name,
    config: GemmaConfig,
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    vocabulary: Vocabulary,
    kind: str = "F16",
    *,
    name: str | None = None,
) -> Path:
    """Write a whole model as one GGUF file, replacing the one there; its path.

    Args:
        path: the file, "....gguf".
        config: the model's GemmaConfig.
        tensors: released name -> torch.Tensor, numpy or jax array, `LazyTensor`, or a callable that gives one. A weight
            in 8 or 4 bits comes as gemmakit stores it: codes under its name, "..._scale", "..._zero".
        vocabulary: `gemmakit.text.gguf.vocabulary_of` a tokenizer.
        kind: of the matrices: F32, F16, BF16, Q8_0, Q5_0 or Q4_0. Norms are always F32. With Q4_0 the embedding, which
            is the head too, is Q8_0, and so is that which layers have of their own; a matrix whose rows are no multiple
            of 32 is F16, as llama.cpp has it. Codes that the type's blocks of 32 can hold are copied as they are.
        name: general.name; by default the file's.

    At every instant a reader finds the old file or the new one, whole, even after kill -9 or on a full disk. Takes a
    few MB beside the tensors, which may be maps of the very file that is replaced.

    Raises:
        InputError: a kind, tensors that the configuration does not have, lack or have in another shape; NaN; numbers
            that the type cannot hold.
        ConfigError: a model that llama.cpp's Gemma cannot express.
        CheckpointError: not enough disk, with needed and free bytes; a failed write.
        MissingDependency: without the package gguf.
    """
    path = Path(path).expanduser()
    if kind not in FILE_TYPES:
        raise InputError(f"kind is {kind!r}; it must be one of {', '.join(FILE_TYPES)}.")
    if len(vocabulary.entries) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(vocabulary.entries)} tokens and the model {config.vocab_size} rows for them: "
            "resize_token_embeddings first."
        )
    metadata = {**model_keys(config, kind, name or path.stem), **word_keys(vocabulary, config)}
    return _replace(path, metadata, _plan(dict(tensors), config, kind))


def write_gguf_adapter(path: Name, config: GemmaConfig, alpha: float, tensors: Mapping[str, Any]) -> Path:
    """Write a low-rank adapter as a GGUF file that llama.cpp puts beside a model, replacing the one there; its path.

    config: of the model that it is for. alpha: updates are scaled by alpha / rank. tensors, written in float32:
    "blk.0.attn_q.weight.lora_a" (r, I) and "....lora_b" (O, r). Raises as `write_gguf`.
    """
    path = Path(path).expanduser()
    if config.kind.gguf_architecture is None:
        raise ConfigError(
            f"there is no GGUF form of {config.kind.title} to put an adapter beside: gemmakit merge makes it part of "
            "the model."
        )
    metadata: dict[str, Any] = {"general.architecture": config.kind.gguf_architecture, "general.type": "adapter"}
    metadata |= {"adapter.type": "lora", "adapter.lora.alpha": float(alpha), "general.name": path.stem}
    items = [
        _Item(name, TYPES["F32"], tuple(describe(value)[1]), partial(_encoded, name, value, "F32"))
        for name, value in tensors.items()
    ]
    return _replace(path, metadata, items)


def _replace(path: Path, metadata: Mapping[str, Any], items: list[_Item]) -> Path:
    with saving_into(path.parent) as staging:
        header = _header(staging / "header", metadata, items)
        require_disk(path, [len(header), *(item.nbytes + _padding(item.nbytes) for item in items)])
        staged = staging / path.name
        write(staged, _pieces(header, items))
        os.replace(staged, path)
        sync_directory(path.parent)
    return path


# -- the file ----------------------------------------------------------------------------------------------------------


def _gguf_package() -> Any:
    """The package gguf: its writer, and how it rounds to blocks."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependency("Writing GGUF files needs the package gguf: `pip install 'gguf>=0.18'`.") from error
    return gguf


def _header(scratch: Path, metadata: Mapping[str, Any], items: Iterable[_Item]) -> bytes:
    """The file up to its first tensor. gguf's writer makes it; tensors it would want whole, so it gets none."""
    gguf = _gguf_package()
    types = gguf.GGUFValueType
    kinds = {list: types.ARRAY, str: types.STRING, bool: types.BOOL, int: types.UINT32, float: types.FLOAT32}
    writer = gguf.GGUFWriter(scratch, metadata["general.architecture"])  # which is its first key
    for key, value in metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, kinds[type(value)])
    for item in items:
        number = gguf.GGMLQuantizationType(item.kind.number)
        writer.add_tensor_info(item.name, item.shape, np.dtype("float32"), item.nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = scratch.read_bytes()
    return header + bytes(_padding(len(header)))


def _pieces(header: bytes, items: Iterable[_Item]) -> Iterator[bytes | memoryview]:
    yield header
    for item in items:
        written = 0
        for chunk in item.chunks():
            data = memoryview(chunk).cast("B")
            written += data.nbytes
            yield data
        if written != item.nbytes:
            raise InputError(f"tensor {item.name!r} has {written} bytes, and {item.nbytes} were announced.")
        yield bytes(_padding(written))


def _padding(size: int) -> int:
    """Bytes from `size` to the next place where a tensor may begin."""
    return -size % _ALIGNMENT


# -- its tensors -------------------------------------------------------------------------------------------------------


def _plan(tensors: dict[str, Any], config: GemmaConfig, kind: str) -> list[_Item]:
    """Every tensor of the configuration, in the order of the model."""
    model_type = config.model_type
    shapes = {str(gguf_name(ours, model_type)): shape for ours, shape in tensor_shapes(config).items()}
    given: dict[str, str] = {}
    for key in tensors:
        if (weight := _weight_of(key)) in tensors and weight != key:
            continue  # scale or zero of another one
        theirs = gguf_name(key, model_type)
        if theirs == "output.weight":
            continue  # tied: it is the embedding
        if theirs is None or theirs not in shapes:
            raise InputError(
                f"a Gemma of this configuration has no {key!r}. Leave it out, or correct the configuration."
            )
        given[theirs] = key
    lacking = [theirs for theirs in shapes if theirs not in given]
    if lacking:
        raise InputError(f"{len(lacking)} tensors of the configuration are missing, first {lacking[0]!r}.")
    offset = config.kind.norm_offset
    items = [_item(theirs, given[theirs], tensors, shape, kind, offset) for theirs, shape in shapes.items()]
    return [*items, *_rope_factors(config)]


def _rope_factors(config: GemmaConfig) -> list[_Item]:
    """Where only a part of a head's features turns, the tensor that says so."""
    if "proportional" not in own_rope_types(config):
        return []
    rope, half = config.rope(FULL_ATTENTION), config.rotary_dim(FULL_ATTENTION) // 2
    part = rope.get("partial_rotary_factor") if rope["rope_type"] == "proportional" else None
    turning = half if part is None else int(part * 2 * half // 2)
    factors = np.where(np.arange(half) < turning, 1.0, STANDS_STILL).astype(np.float32)
    return [_Item(ROPE_FACTORS, TYPES["F32"], (half,), lambda: iter([factors.data]))]


def _weight_of(key: str) -> str:
    return key.removesuffix("_scale").removesuffix("_zero")


def _item(
    theirs: str, key: str, tensors: dict[str, Any], shape: tuple[int, ...], kind: str, norm_offset: float
) -> _Item:
    if f"{key}_scale" in tensors:
        return _packed_item(theirs, key, tensors, shape, kind)
    found = describe(tensors[key])[1]
    if found != shape:
        raise InputError(f"tensor {key!r} has shape {found}, and the configuration asks for {shape}.")
    chosen = _kind_for(theirs, shape, kind)
    more = norm_offset if is_norm(theirs) else 0.0
    return _Item(theirs, TYPES[chosen], shape, partial(_encoded, key, tensors[key], chosen, more))


def _kind_for(theirs: str, shape: tuple[int, ...], kind: str) -> str:
    if is_vector(theirs):
        return "F32"
    if kind.startswith("Q") and shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if kind == "Q4_0" and theirs in (EMBEDDING, TABLE) else kind


# -- numbers ---------------------------------------------------------------------------------------------------------


def _encoded(key: str, value: Any, kind: str, more: float = 0.0) -> Iterator[Any]:
    """more: what is stored on top of the numbers, of a norm that multiplies by that + its weight."""
    array = made(value)
    rows = max(1, _CHUNK_ELEMENTS // max(1, prod(array.shape[1:])))
    for begin in range(0, len(array), rows):
        piece = array[begin : begin + rows]
        yield _bytes(key, _floats(piece) + np.float32(more) if more else piece, kind)


def _bytes(key: str, piece: Any, kind: str) -> Any:
    """The bytes of some rows in this type."""
    numbers = _floats(piece)
    if kind == "F32":
        return numbers.data
    if kind in _LARGEST:
        _refuse_too_large(key, numbers, kind)
    if kind == "F16":
        return numbers.astype(np.float16).data
    gguf = _gguf_package()
    with np.errstate(all="ignore"):  # a step that has no finite inverse is zero in 16 bits, whatever its codes
        return gguf.quantize(numbers.reshape(1, -1), gguf.GGMLQuantizationType[kind]).data


def _floats(piece: Any) -> Any:
    """float32 in numpy, whatever it was."""
    if hasattr(piece, "detach"):
        piece = piece.detach().to("cpu").float().numpy()
    return np.ascontiguousarray(np.asarray(piece), np.float32)


def _refuse_too_large(key: str, numbers: Any, kind: str) -> None:
    largest = float(np.abs(numbers).max(initial=0.0))
    if not largest <= _LARGEST[kind]:
        raise InputError(
            f"tensor {key!r} holds {largest}, which {kind} cannot express: the limit is {_LARGEST[kind]:g}. "
            "Use BF16 or F32, or repair the weights."
        )


# -- codes -----------------------------------------------------------------------------------------------------------


def _packed_item(theirs: str, key: str, tensors: dict[str, Any], shape: tuple[int, ...], kind: str) -> _Item:
    """A weight of codes: copied where the type holds the same, else computed and written as `kind`."""
    dtype, found = describe(tensors[key])
    layouts = {bits: stored_parts(shape[0], shape[1], bits, BLOCK)[""] for bits in BITS}
    bits = next((bits for bits, layout in layouts.items() if layout == (dtype, tuple(found))), None)
    if bits is None:
        needed = ", ".join(f"{size} of {kind} for {bits} bits" for bits, (kind, size) in layouts.items())
        raise InputError(f"tensor {key!r} has codes {found} of {dtype}; a weight {shape} has {needed}.")
    chosen = _kind_for(theirs, shape, kind)
    parts = [tensors.get(key + part) for part in ("", "_scale", "_zero")]
    return _Item(theirs, TYPES[chosen], shape, partial(_recoded, key, bits, parts, shape, chosen))


def _recoded(key: str, bits: int, parts: list[Any], shape: tuple[int, ...], kind: str) -> Iterator[Any]:
    codes, scale, zero = (None if part is None else made(part) for part in parts)
    packed = _Packed(key, bits, codes, scale, zero, shape)
    if packed.fits(kind):
        yield from packed.blocks()
    else:
        for numbers in packed.numbers():
            yield _bytes(key, numbers, kind)


class _Packed:
    """Codes, scales and zeros of a weight (O, I), in the layout of `gemmakit.pytorch.kernels.packed`."""

    def __init__(self, key: str, bits: int, codes: Any, scale: Any, zero: Any, shape: tuple[int, ...]):
        self.bits, self.codes, self.scale, self.zero, self.shape = bits, codes, scale, zero, shape
        groups = scale.shape[1]
        sizes = (shape[1],) if groups == 1 else _GROUPS
        self.group = next((size for size in sizes if -(-shape[1] // size) == groups), 0)
        if not self.group or len(scale) != shape[0]:
            raise InputError(
                f"tensor {key!r} of shape {shape} has scales of {tuple(scale.shape)}, which do not fit it."
            )

    def fits(self, kind: str) -> bool:
        """Whether blocks of `kind` hold the very same codes and steps."""
        if self.shape[1] % BLOCK or describe(self.scale)[0] != "float16" or self.group % BLOCK:
            return False
        if kind in ("Q8_0", "Q5_0"):
            return self.bits == (8 if kind == "Q8_0" else 5) and self.zero is None
        return kind == "Q4_0" and self.bits == 4 and (self.zero is None or bool((self.zero == 8).all()))

    def blocks(self) -> Iterator[Any]:
        for rows in self._rows():
            codes = _array(self.codes[rows], np.uint8)
            steps = np.repeat(_array(self.scale[rows], np.float16), self.group // BLOCK, axis=1)
            steps = np.ascontiguousarray(steps[:, : self.shape[1] // BLOCK])
            if self.bits == 5:
                yield five_bit_blocks(codes, steps).data
                continue
            steps, count = steps.view(np.uint8), steps.size
            yield np.concatenate([steps.reshape(count, 2), codes.reshape(count, -1)], axis=1).data

    def numbers(self) -> Iterator[Any]:
        """float32 (rows, I) a chunk."""
        for rows in self._rows():
            codes = self._codes(rows).astype(np.float32)
            spread = np.arange(self.shape[1]) // self.group
            if self.zero is not None:
                codes -= _array(self.zero[rows], np.uint8)[:, spread]
            yield codes * _floats(self.scale[rows])[:, spread]

    def _codes(self, rows: slice) -> Any:
        if self.bits == 8:
            return _array(self.codes[rows], np.int8)
        raw, more = _array(self.codes[rows], np.uint8), self.bits - 4
        fours = raw.reshape(len(raw), -1, 16 * self.bits if more else BLOCK // 2)
        low = fours[..., : 4 * BLOCK // 2].reshape(-1, 1, BLOCK // 2)
        codes = low >> np.array([0, 4], np.uint8)[:, None] & 15
        if more:
            shifts = np.arange(0, 8, more, dtype=np.uint8)[:, None]
            upper = fours[..., 4 * BLOCK // 2 :].reshape(-1, more, 1, BLOCK // 2) >> shifts & (1 << more) - 1
            codes = (codes | upper.reshape(-1, 2, BLOCK // 2) << 4).view(np.int8) - np.int8(1 << self.bits - 1)
        return codes.reshape(len(raw), -1)[:, : self.shape[1]]

    def _rows(self) -> Iterator[slice]:
        rows = max(1, _CHUNK_ELEMENTS // self.shape[1])
        for begin in range(0, self.shape[0], rows):
            yield slice(begin, begin + rows)


def _array(piece: Any, dtype: Any) -> Any:
    """In numpy, bit for bit."""
    if hasattr(piece, "detach"):
        piece = piece.detach().to("cpu").contiguous().numpy()
    return np.ascontiguousarray(np.asarray(piece)).view(dtype)
