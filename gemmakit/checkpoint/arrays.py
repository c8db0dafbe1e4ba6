"""Arrays of any library, or what makes them: their dtype, shape and bytes, asked without importing the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gemmakit.dtypes import dtype_name


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written comes: dtype name ("bfloat16"), shape, and how to make it."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Any]


def describe(value: Any) -> tuple[str, tuple[int, ...]]:
    """dtype name and shape of an array, of a `LazyTensor`, which is not made for it, or of what a callable gives."""
    array = value() if _is_maker(value) else value
    return dtype_name(array.dtype), tuple(int(n) for n in array.shape)


def made(value: Any) -> Any:
    """The array behind a LazyTensor or a callable."""
    while isinstance(value, LazyTensor) or _is_maker(value):
        value = value.load() if isinstance(value, LazyTensor) else value()
    return value


def as_bytes(tensor: Any) -> memoryview:
    """The elements in row-major order, little-endian, without a copy where the tensor is contiguous on the CPU."""
    import numpy as np

    if type(tensor).__module__.partition(".")[0] != "torch" and not hasattr(tensor, "detach"):
        array = np.ascontiguousarray(np.asarray(tensor))
    else:
        import torch

        array = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.reshape(-1).view(np.uint8).data


def _is_maker(value: Any) -> bool:
    return callable(value) and not hasattr(value, "shape")
