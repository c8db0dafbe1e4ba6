"""How a weight is multiplied on a CPU: as it is stored, in native code, or as a float32 copy.

XLA's own code for CPUs multiplies float32 alone, is slow at a few rows, and converts all weights of 16 bits at every
call, and each time that it enters a loop, which for a stream is each token. So a call is told, in the collection
"products" beside "params", of every kernel and of a tied head: an empty array for one that native code reads where it
lies (gemmakit/native/xla.cpp), else the numbers to multiply instead. Without the collection XLA multiplies by the
weights, as it does under a caller's jit, grad or vmap, of which native code knows nothing.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gemmakit import native
from gemmakit.checkpoint import require_memory

try:
    from jax import ffi
except ImportError:  # before jax 0.5
    from jax.extend import ffi  # type: ignore[no-redef]

FORMATS = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16")))
BY_INPUTS, BY_OUTPUTS = "gemmakit_xla_multiply", "gemmakit_xla_multiply_rows"


def told(params: Any, dtype: Any, tied: bool, on_mesh: bool, copies: bool) -> dict[str, Any]:
    """The collection "products" for a model that computes in `dtype`; {} where XLA does as well without.

    tied: whether the embedding is the head. on_mesh: whether weights are spread over devices, which XLA multiplies.
    copies: whether to convert what XLA would convert again and again.

    Raises NotEnoughMemory: for the copies.
    """
    if jax.default_backend() != "cpu":
        return {}
    dtype, float32 = jnp.dtype(dtype), jnp.dtype("float32")
    leaves: dict[Any, Any] = flatten_dict(params)
    read = {
        path: leaf
        for path, leaf in leaves.items()
        if path[-1] == "kernel" or (tied and path[-2:] == ("embed_tokens", "embedding"))
    }
    stored = {
        path: leaf
        for path, leaf in read.items()
        # Not those that products in `dtype` round first.
        if not on_mesh and _is_here(leaf) and leaf.dtype in FORMATS and dtype in (float32, leaf.dtype) and is_native()
    }
    # A stack of layers has an axis more, over which it is scanned.
    empty = {path: np.zeros((*leaf.shape[:-2], 0), np.float32) for path, leaf in stored.items()}
    if not copies:
        return unflatten_dict(empty)
    wide = {path: leaf for path, leaf in read.items() if path not in stored and not leaf.dtype == dtype == float32}
    require_memory(
        sum(4 * leaf.size for leaf in wide.values()),
        "a copy of the weights in float32, which generating on a CPU takes,",
        remedy="Close other programs, or use the PyTorch backend, which multiplies by the weights as they are stored.",
    )
    return unflatten_dict(empty | {path: leaf.astype(dtype).astype(float32) for path, leaf in wide.items()})


def product(x: jax.Array, weight: jax.Array, told: jax.Array | None, *, by_outputs: bool = False) -> jax.Array:
    """x (..., in) by a weight (in, out), or (out, in) `by_outputs`: (..., out), in x's dtype.

    told: what the collection "products" has for the weight; then sums are in float32, and rounded once.
    """
    if told is not None and not told.size:
        result = jax.ShapeDtypeStruct((*x.shape[:-1], weight.shape[not by_outputs]), x.dtype)
        return ffi.ffi_call(BY_OUTPUTS if by_outputs else BY_INPUTS, result)(x, weight)
    by = weight.astype(x.dtype) if told is None else told
    return (x.astype(by.dtype) @ (by.T if by_outputs else by)).astype(x.dtype)


@lru_cache(maxsize=1)
def is_native() -> bool:
    """Whether there are native kernels that XLA takes, which it then knows by name."""
    library = native.library()
    if library is None:
        return False
    try:
        for name in (BY_INPUTS, BY_OUTPUTS):
            ffi.register_ffi_target(name, ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:  # jaxlib raises what it likes where it wants another version
        warnings.warn(f"gemmakit: XLA multiplies by itself, which is slower: {error}", stacklevel=2)
        return False
    return True


def _is_here(leaf: Any) -> bool:
    """Whether an array lies on one device, a CPU."""
    devices = leaf.devices() if isinstance(leaf, jax.Array) else ()
    return len(devices) <= 1 and all(device.platform == "cpu" for device in devices)
