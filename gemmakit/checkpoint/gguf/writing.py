"""A Gemma as one GGUF file that llama.cpp runs, written a few rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from gemmakit.checkpoint.arrays import describe, made
from gemmakit.checkpoint.gguf.names import gguf_name, is_norm
from gemmakit.checkpoint.save import require_disk, saving_into, sync_directory, write
from gemmakit.errors import InputError
from gemmakit.gguf import KINDS, Kind, Vocabulary
from gemmakit.gguf.encoding import encode_header, padding
from gemmakit.gguf.settings import EMBEDDING, FILE_TYPES, metadata_of
from gemmakit.hub import Name

_CHUNK_ELEMENTS = 1 << 20
_BLOCK = 32
_GROUPS = (32, 128)
# A step of Q8_0 or Q4_0 is stored in 16 bits: of Q8_0 a 127th of the largest number, of Q4_0 an eighth.
_LARGEST = {"F16": 65504.0, "Q8_0": 65504.0 * 127, "Q4_0": 65504.0 * 8}


@dataclass(frozen=True)
class _Item:
    """A tensor to write: its name and type in the file, its shape, and its bytes, made a chunk at a time."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    chunks: Any  # () -> Iterator of bytes-like

    @property
    def nbytes(self) -> int:
        return self.kind.size(prod(self.shape))


def write_gguf(
    path: Name,
    config: Any,
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
        vocabulary: `gemmakit.text.gguf.vocabulary_of` a folder, a tokenizer or a SentencePiece model.
        kind: of the matrices: F32, F16, BF16, Q8_0 or Q4_0. Norms are always F32. With Q4_0 the embedding, which is the
            head too, is Q8_0; a matrix whose rows are no multiple of 32 is F16, as llama.cpp has it. Codes of groups of
            32 that Q8_0 or Q4_0 can hold are copied as they are.
        name: general.name; by default the file's.

    At every instant a reader finds the old file or the new one, whole, even after kill -9 or on a full disk. Takes a
    few MB beside the tensors, which may be maps of the very file that is replaced.

    Raises:
        InputError: a kind, tensors that the configuration does not have, lack or have in another shape; NaN; numbers
            that the type cannot hold.
        ConfigError: a model that llama.cpp's Gemma cannot express.
        CheckpointError: not enough disk, with needed and free bytes; a failed write.
    """
    path = Path(path).expanduser()
    if kind not in FILE_TYPES:
        raise InputError(f"kind is {kind!r}; it must be one of {', '.join(FILE_TYPES)}.")
    if len(vocabulary.entries) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(vocabulary.entries)} tokens and the model {config.vocab_size} rows for them: "
            "resize_token_embeddings first."
        )
    metadata = {**metadata_of(config, kind, name or path.stem), **vocabulary.metadata(config.vocab_size)}
    items = _plan(dict(tensors), config, kind)
    header = encode_header(metadata, {item.name: (item.kind, item.shape) for item in items})
    with saving_into(path.parent) as staging:
        require_disk(path, [len(header), *(item.nbytes + padding(item.nbytes) for item in items)])
        staged = staging / path.name
        write(staged, _encode(header, items))
        os.replace(staged, path)
        sync_directory(path.parent)
    return path


# -- what is written -------------------------------------------------------------------------------------------------


def _plan(tensors: dict[str, Any], config: Any, kind: str) -> list[_Item]:
    """Every tensor of the configuration, in the order of the model."""
    shapes = _shapes(config)
    given: dict[str, str] = {}
    for key in tensors:
        if (weight := _weight_of(key)) in tensors and weight != key:
            continue  # scale or zero of another one
        theirs = gguf_name(key)
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
    return [_item(theirs, given[theirs], tensors, shape, kind) for theirs, shape in shapes.items()]


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = {
        "attn_norm": (width,), "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width),
        "attn_output": (width, queries), "ffn_norm": (width,), "ffn_gate": (inner, width), "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }  # fmt: skip
    blocks = {f"blk.{i}.{part}.weight": shape for i in range(config.num_hidden_layers) for part, shape in layer.items()}
    return {EMBEDDING: (config.vocab_size, width), **blocks, "output_norm.weight": (width,)}


def _weight_of(key: str) -> str:
    return key.removesuffix("_scale").removesuffix("_zero")


def _item(theirs: str, key: str, tensors: dict[str, Any], shape: tuple[int, ...], kind: str) -> _Item:
    if f"{key}_scale" in tensors:
        return _packed_item(theirs, key, tensors, shape, kind)
    value = tensors[key]
    found = describe(value)[1]
    if found != shape:
        raise InputError(f"tensor {key!r} has shape {found}, and the configuration asks for {shape}.")
    chosen = _kind_for(theirs, shape, kind)
    return _Item(theirs, KINDS[chosen], shape, partial(_encoded, key, tensors[key], chosen))


def _kind_for(theirs: str, shape: tuple[int, ...], kind: str) -> str:
    if is_norm(theirs):
        return "F32"
    if kind.startswith("Q") and shape[-1] % _BLOCK:
        return "F16"
    return "Q8_0" if kind == "Q4_0" and theirs == EMBEDDING else kind


# -- numbers ---------------------------------------------------------------------------------------------------------


def _encoded(key: str, value: Any, kind: str) -> Iterator[Any]:
    array = made(value)
    rows = max(1, _CHUNK_ELEMENTS // max(1, prod(array.shape[1:])))
    for begin in range(0, len(array), rows):
        piece = array[begin : begin + rows]
        yield _bytes(key, _norm(piece) if is_norm(key) else piece, kind)


def _norm(weight: Any) -> Any:
    return _floats(weight) + 1


def _bytes(key: str, piece: Any, kind: str) -> Any:
    """The bytes of some rows in this type."""
    import numpy as np

    if kind == "BF16":
        return _bfloat16(piece)
    numbers = _floats(piece)
    if kind == "F32":
        return numbers.data
    _refuse_too_large(key, numbers, kind)
    if kind == "F16":
        return numbers.astype(np.float16).data
    from gemmakit.checkpoint.gguf.blocks import quantize

    return np.ascontiguousarray(quantize(kind, numbers.reshape(-1, _BLOCK))).data


def _floats(piece: Any) -> Any:
    """float32 in numpy, whatever it was."""
    import numpy as np

    if hasattr(piece, "detach"):
        piece = piece.detach().to("cpu").float().numpy()
    return np.ascontiguousarray(np.asarray(piece), np.float32)


def _bfloat16(piece: Any) -> Any:
    """Rounded to the nearest, halves to even; what is bfloat16 already goes as it is."""
    import numpy as np

    bits = _floats(piece).view(np.uint32)
    high = (bits >> 16).astype(np.uint16)
    nan = bits & 0x7FFFFFFF > 0x7F800000  # must not be rounded to infinity
    high += (bits & 0xFFFF) + (high & 1) > 0x8000
    return np.where(nan, (bits >> 16).astype(np.uint16) | 0x40, high).data


def _refuse_too_large(key: str, numbers: Any, kind: str) -> None:
    import numpy as np

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
    needed = shape if dtype == "int8" else (shape[0], 16 * -(-shape[1] // _BLOCK))
    if found != needed:
        raise InputError(f"tensor {key!r} has codes {found}, and the configuration asks for {needed} of {dtype}.")
    chosen = _kind_for(theirs, shape, kind)
    parts = [tensors.get(key + part) for part in ("", "_scale", "_zero")]
    return _Item(theirs, KINDS[chosen], shape, partial(_recoded, key, parts, shape, chosen))


def _recoded(key: str, parts: list[Any], shape: tuple[int, ...], kind: str) -> Iterator[Any]:
    codes, scale, zero = (None if part is None else made(part) for part in parts)
    packed = _Packed(key, codes, scale, zero, shape)
    if packed.fits(kind):
        yield from packed.blocks()
    else:
        for numbers in packed.numbers():
            yield _bytes(key, numbers, kind)


class _Packed:
    """Codes, scales and zeros of a weight (O, I), in the layout of `gemmakit.pytorch.kernels.packed`."""

    def __init__(self, key: str, codes: Any, scale: Any, zero: Any, shape: tuple[int, ...]):
        self.codes, self.scale, self.zero, self.shape = codes, scale, zero, shape
        self.bits = 8 if describe(codes)[0] == "int8" else 4
        groups = scale.shape[1]
        sizes = (shape[1],) if groups == 1 else _GROUPS
        self.group = next((size for size in sizes if -(-shape[1] // size) == groups), 0)
        if not self.group or len(scale) != shape[0]:
            raise InputError(
                f"tensor {key!r} of shape {shape} has scales of {tuple(scale.shape)}, which do not fit it."
            )

    def fits(self, kind: str) -> bool:
        """Whether blocks of `kind` hold the very same codes and steps."""
        if self.shape[1] % _BLOCK or describe(self.scale)[0] != "float16" or self.group % _BLOCK:
            return False
        if kind == "Q8_0":
            return self.bits == 8 and self.zero is None
        return kind == "Q4_0" and self.bits == 4 and (self.zero is None or bool((self.zero == 8).all()))

    def blocks(self) -> Iterator[Any]:
        import numpy as np

        for rows in self._rows():
            codes = _array(self.codes[rows], np.uint8)
            steps = np.repeat(_array(self.scale[rows], np.float16), self.group // _BLOCK, axis=1)
            steps = np.ascontiguousarray(steps[:, : self.shape[1] // _BLOCK]).view(np.uint8)
            count = steps.size // 2
            yield np.concatenate([steps.reshape(count, 2), codes.reshape(count, -1)], axis=1).data

    def numbers(self) -> Iterator[Any]:
        """float32 (rows, I) a chunk."""
        import numpy as np

        for rows in self._rows():
            codes = self._codes(rows).astype(np.float32)
            spread = np.arange(self.shape[1]) // self.group
            if self.zero is not None:
                codes -= _array(self.zero[rows], np.uint8)[:, spread]
            yield codes * _floats(self.scale[rows])[:, spread]

    def _codes(self, rows: slice) -> Any:
        import numpy as np

        if self.bits == 8:
            return _array(self.codes[rows], np.int8)
        raw = _array(self.codes[rows], np.uint8)
        halves = raw.reshape(len(raw), -1, 1, _BLOCK // 2) >> np.array([0, 4], np.uint8)[:, None] & 15
        return halves.reshape(len(raw), -1)[:, : self.shape[1]]

    def _rows(self) -> Iterator[slice]:
        rows = max(1, _CHUNK_ELEMENTS // self.shape[1])
        for begin in range(0, self.shape[0], rows):
            yield slice(begin, begin + rows)


def _array(piece: Any, dtype: Any) -> Any:
    """In numpy, bit for bit."""
    import numpy as np

    if hasattr(piece, "detach"):
        piece = piece.detach().to("cpu").contiguous().numpy()
    return np.ascontiguousarray(np.asarray(piece)).view(dtype)


# -- the file --------------------------------------------------------------------------------------------------------


def _encode(header: bytes, items: Iterable[_Item]) -> Iterator[bytes | memoryview]:
    yield header
    for item in items:
        written = 0
        for chunk in item.chunks():
            data = memoryview(chunk).cast("B")
            written += data.nbytes
            yield data
        if written != item.nbytes:
            raise InputError(f"tensor {item.name!r} has {written} bytes, and {item.nbytes} were announced.")
        yield bytes(padding(written))
