"""Arrays of any library, in files or in memory: their dtype, shape and bytes, asked without importing the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from gemmakit.dtypes import dtype_name
from gemmakit.errors import CheckpointError, MissingDependency

# name that torch and ml_dtypes use -> bits an element
BITS = {
    "bool": 8,
    "uint8": 8,
    "int8": 8,
    "uint16": 16,
    "int16": 16,
    "uint32": 32,
    "int32": 32,
    "uint64": 64,
    "int64": 64,
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "float64": 64,
    "complex64": 64,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
    "float4_e2m1fn_x2": 4,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file declares it: dtype name ("bfloat16"), shape, and the byte range [begin, end) in the file.

    Tensors of a pickle file have no known place: begin is 0 and end is the number of bytes. So have those that are not
    `mapped`: they are made from other bytes when asked for, and then take memory.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    mapped: bool = True

    @property
    def nbytes(self) -> int:
        """The size of the tensor's data in bytes."""
        return self.end - self.begin


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


def numpy_dtype(name: str, dtype: str) -> Any:
    """The numpy dtype of tensor `name`. Raises MissingDependency, and CheckpointError where there is none."""
    import numpy as np

    try:
        return np.dtype(dtype)
    except TypeError:
        pass
    try:
        ml_dtypes = import_module("ml_dtypes")
    except ImportError as error:
        raise MissingDependency(
            f"Tensor {name!r} is {dtype}, which numpy lacks: `pip install ml_dtypes`, or read it with framework='pt'."
        ) from error
    kind = getattr(ml_dtypes, dtype, None)
    if kind is None or dtype.startswith(("float4", "float6")):
        raise CheckpointError(f"Tensor {name!r} is {dtype}, which has no numpy dtype.")
    return np.dtype(kind)


def to_jax(array: Any) -> Any:
    """A numpy array as jax's. Raises MissingDependency."""
    try:
        jnp = import_module("jax.numpy")
    except ImportError as error:
        raise MissingDependency("framework='flax' needs jax: `pip install 'gemmakit[flax]'`.") from error
    return jnp.asarray(array)
