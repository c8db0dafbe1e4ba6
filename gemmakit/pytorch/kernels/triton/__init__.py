"""The CUDA kernels, written in Triton, and `launch`, which starts them; `reference` has their plain-torch forms.

Importing this package and `launch` needs no Triton; starting a kernel does. Nothing here was tuned by trial on a
device unless tuning.py says so beside the number.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch

from gemmakit.pytorch.kernels.decision import Decision
from gemmakit.pytorch.kernels.packed import FORMATS

# What the kernels compute in, and how many rows those that read weights take at once.
DTYPES = tuple(FORMATS)
MAX_ROWS = 8
BITS = (4, 8)  # of codes that they read; others are expanded by torch

# Below 8.0 there is neither bfloat16 nor an asynchronous copy, and Triton no longer supports them.
LEAST_CAPABILITY = (8, 0)

_RUNS = Decision("Triton")
# Why a kernel did not start, by type of device: none is tried there again.
_refused: dict[str, Decision] = {}


class Refused(RuntimeError):
    """A kernel could not be compiled or started; nothing was written."""


def refuse(device: torch.device, error: Exception) -> Refused:
    """Note, and warn once, that plain torch takes the kernels' place on devices of this type from now on."""
    said = str(error).strip().splitlines()
    why = f"one did not start ({type(error).__name__}{f': {said[0]}' if said else ''})"
    if device.type not in _refused:
        warnings.warn(f"gemmakit: its Triton kernels are not used on {device}: {why}.", stacklevel=4)
    _refused.setdefault(device.type, _not(why))
    return Refused(why)


@contextmanager
def starting(device: torch.device) -> Generator[None]:
    """Around what starts a kernel: raises Refused where that fails, and later calls are not to ask for any."""
    try:
        with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton takes the current one
            yield
    except (Refused, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what compilers and drivers raise has no common type
        raise refuse(device, error) from error


def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`. The CPU counts under TRITON_INTERPRET=1, for tests."""
    return decision(device) is _RUNS


def decision(device: torch.device | None = None) -> Decision:
    """Whether the kernels run on `device` (default: the current GPU), and why not."""
    if os.environ.get("GEMMAKIT_TRITON") == "0":
        return _not("GEMMAKIT_TRITON is 0")
    return _refused.get("cuda" if device is None else device.type) or _lacks(device)


def _not(why: str) -> Decision:
    return Decision("torch", f"Triton kernels: {why}")


@functools.cache
def _lacks(device: torch.device | None) -> Decision:
    if importlib.util.find_spec("triton") is None:
        return _not("the triton package is not installed: pip install triton (PyTorch for CUDA on Linux brings it)")
    if interpreted():
        kind = "cuda" if device is None else device.type
        return _RUNS if kind in ("cpu", "cuda") else _not(f"there are none for {kind}")
    if device is not None and device.type != "cuda":
        return _not(f"they are CUDA kernels, and this is {device.type}")
    if not torch.cuda.is_available():
        return _not("PyTorch sees no CUDA device")
    if torch.version.hip is not None:
        return _not("they are tested on NVIDIA devices only")
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return _not(f"the GPU has compute capability {found[0]}.{found[1]}; they need {least}")
    return _RUNS


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
