"""A GGUF file as named arrays under the released checkpoint's names.

F32, F16 and BF16 matrices are views of the mapped file. Blocks become numbers when they are asked for, a few rows at a
time, or stay codes and scales in gemmakit's own layout (`gemmakit.pytorch.kernels.packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gemmakit.checkpoint.arrays import BITS, TensorInfo
from gemmakit.checkpoint.gguf.names import is_norm, released_name
from gemmakit.errors import CheckpointError
from gemmakit.gguf import GgufHeader, GgufTensor, read_gguf_header
from gemmakit.gguf.kinds import PLAIN

DECODED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_CHUNK_ELEMENTS = 1 << 20

Maker = Callable[[str], Any]  # framework "pt" or "np" -> an array on the CPU


class GgufFile:
    """One GGUF file. Opening checks its header, its architecture, and every tensor's name and type.

    dtype: what blocks are dequantized to.
    keep: tensors (in the file's own naming) of Q8_0 or Q4_0 to give as codes under their own name, "..._scale", and for
    Q4_0 "..._zero".
    """

    def __init__(self, path: Path, dtype: str = "float32", keep: Collection[str] = ()):
        self.path = path
        header = read_gguf_header(path)
        header.require_gemma()
        self._dtype = dtype
        self._makers: dict[str, Maker] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, held in header.tensors.items():
            for part, info, make in self._parts(_named(header, name, held), held, name in keep):
                tensors[part], self._makers[part] = info, make
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.metadata: Mapping[str, str] = MappingProxyType({"format": "gguf"})

    def tensor(self, name: str, framework: str, device: Any) -> Any:
        if framework == "pt":
            return self._makers[name]("pt").to(device)
        array = self._makers[name]("np")
        if framework == "np":
            return array
        from gemmakit.checkpoint.arrays import to_jax

        return to_jax(array)

    def close(self) -> None:
        """Nothing is held open: every array has a mapping of its own."""

    def _parts(self, name: str, held: GgufTensor, keep: bool) -> Iterator[tuple[str, TensorInfo, Maker]]:
        """What a tensor of the file is given out as."""
        kind, shape = held.kind.name, held.shape
        if is_norm(name):
            yield name, _made("float32", shape), lambda framework: self._norm(name, held, framework)
        elif kind in PLAIN:
            info = TensorInfo(PLAIN[kind], shape, held.begin, held.end)
            yield name, info, lambda framework: self._view(name, info, framework)
        elif keep:
            yield from self._packed(name, held)
        else:
            yield name, _made(self._dtype, shape), lambda framework: self._dequantized(name, held, framework)

    # -- numbers ----------------------------------------------------------------------------------------------------

    def _view(self, name: str, info: TensorInfo, framework: str) -> Any:
        from gemmakit.checkpoint.arrays import numpy_dtype

        raw = self._raw(info.begin, info.end)
        if framework == "pt":
            import torch

            return torch.from_numpy(raw).view(getattr(torch, info.dtype)).view(info.shape)
        return raw.view(numpy_dtype(name, info.dtype)).reshape(info.shape)

    def _norm(self, name: str, held: GgufTensor, framework: str) -> Any:
        """The file's 1 + w, less 1."""
        info = TensorInfo(PLAIN[held.kind.name], held.shape, held.begin, held.end)
        if framework == "pt":
            return self._view(name, info, "pt").float() - 1
        return self._view(name, info, "np").astype("float32") - 1

    def _dequantized(self, name: str, held: GgufTensor, framework: str) -> Any:
        """Every block as numbers, rounded once to the dtype; beside the result it takes a few MB."""
        if framework == "pt":
            import torch

            out = torch.empty(prod(held.shape), dtype=getattr(torch, self._dtype))
            for begin, numbers in self._numbers(held):
                out[begin : begin + numbers.size] = torch.from_numpy(numbers)
            return out.view(held.shape)
        import numpy as np

        from gemmakit.checkpoint.arrays import numpy_dtype

        array = np.empty(prod(held.shape), numpy_dtype(name, self._dtype))
        for begin, numbers in self._numbers(held):
            array[begin : begin + numbers.size] = numbers
        return array.reshape(held.shape)

    def _numbers(self, held: GgufTensor) -> Iterator[tuple[int, Any]]:
        """(first element, float32 numbers) a chunk of blocks."""
        from gemmakit.checkpoint.gguf.blocks import dequantize

        kind = held.kind
        blocks = self._blocks(held)
        chunk = _CHUNK_ELEMENTS // kind.block
        for begin in range(0, len(blocks), chunk):
            yield begin * kind.block, dequantize(kind.name, blocks[begin : begin + chunk]).reshape(-1)

    # -- codes ------------------------------------------------------------------------------------------------------

    def _packed(self, name: str, held: GgufTensor) -> Iterator[tuple[str, TensorInfo, Maker]]:
        """Codes and scales of a matrix, and for 4 bits zeros: every one is 8."""
        rows, width = held.shape
        groups = (rows, width // 32)
        if held.kind.name == "Q8_0":
            yield name, _made("int8", held.shape), lambda framework: self._field(held, 2, "int8", held.shape, framework)
        else:
            codes = (rows, width // 2)
            yield name, _made("uint8", codes), lambda framework: self._field(held, 2, "uint8", codes, framework)
            yield f"{name}_zero", _made("uint8", groups), lambda framework: _full(groups, 8, framework)
        scale = lambda framework: self._field(held, 0, "float16", groups, framework)  # noqa: E731
        yield f"{name}_scale", _made("float16", groups), scale

    def _field(self, held: GgufTensor, at: int, dtype: str, shape: tuple[int, ...], framework: str) -> Any:
        """One field of every block, copied out of them: the two bytes at 0, or all from `at` on."""
        import numpy as np

        blocks = self._blocks(held)
        field = np.ascontiguousarray(blocks[:, at:] if at else blocks[:, :2]).view(dtype).reshape(shape)
        return _as(field, framework)

    def _blocks(self, held: GgufTensor) -> Any:
        return self._raw(held.begin, held.end).reshape(-1, held.kind.nbytes)

    def _raw(self, begin: int, end: int) -> Any:
        """Bytes of the file, mapped; private, so that writing to them never changes the file."""
        import numpy as np

        return np.asarray(np.memmap(self.path, np.uint8, mode="c", offset=begin, shape=(end - begin,)))


def _named(header: GgufHeader, name: str, held: GgufTensor) -> str:
    """The released name. Raises CheckpointError for a tensor that Gemma does not have, or that cannot be read."""
    ours, kind = released_name(name), held.kind.name
    if ours is None:
        raise CheckpointError(f"{header.path} holds {name!r:.120}, for which Gemma has no place. It is another model.")
    readable = tuple(PLAIN) if is_norm(ours) else (*PLAIN, *DECODED)
    if kind not in readable:
        raise CheckpointError(
            f"{header.path}: {name} is of type {kind}; gemmakit reads {', '.join(readable)}. Take a file of one of "
            "these types."
        )
    return ours


def _made(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """An array that is made when asked for, and has no place in the file in this form."""
    return TensorInfo(dtype, shape, 0, prod(shape) * BITS[dtype] // 8, mapped=False)


def _full(shape: tuple[int, ...], value: int, framework: str) -> Any:
    import numpy as np

    return _as(np.full(shape, value, np.uint8), framework)


def _as(array: Any, framework: str) -> Any:
    if framework != "pt":
        return array
    import torch

    return torch.from_numpy(array)
