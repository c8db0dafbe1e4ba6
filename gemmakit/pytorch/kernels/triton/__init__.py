"""The CUDA kernels, written in Triton: each file of kernels has its plain-torch form in reference.py.

Importing this package needs no Triton; asking for a kernel does. Nothing here was tuned by trial on a device unless
tuning.py says so beside the number.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch

# What the kernels compute in, and how many rows those that read weights take at once.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_ROWS = 8

# Below 8.0 there is neither bfloat16 nor an asynchronous copy, and Triton no longer supports them.
LEAST_CAPABILITY = (8, 0)

# Why a kernel did not start, by type of device: none is tried there again.
_refused: dict[str, str] = {}


class Refused(RuntimeError):
    """A kernel could not be compiled or started; nothing was written."""


def refuse(device: torch.device, error: Exception) -> Refused:
    """Note, and warn once, that plain torch takes the kernels' place on devices of this type from now on."""
    said = str(error).strip().splitlines()
    why = f"one did not start ({type(error).__name__}{f': {said[0]}' if said else ''})"
    if device.type not in _refused:
        warnings.warn(f"gemmakit: its Triton kernels are not used on {device}: {why}.", stacklevel=4)
    _refused.setdefault(device.type, why)
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
    return not why_not(device)


def why_not(device: torch.device | None = None) -> str:
    """Why the kernels do not run on `device` (default: the current GPU), in words; empty when they do."""
    if os.environ.get("GEMMAKIT_TRITON") == "0":
        return "GEMMAKIT_TRITON is 0"
    return _refused.get("cuda" if device is None else device.type) or _lacks(device)


@functools.cache
def _lacks(device: torch.device | None) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed: pip install triton (PyTorch for CUDA on Linux brings it)"
    if interpreted():
        return "" if device is None or device.type in ("cpu", "cuda") else f"there are none for {device.type}"
    if device is not None and device.type != "cuda":
        return f"they are CUDA kernels, and this is {device.type}"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.version.hip is not None:
        return "they are tested on NVIDIA devices only"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        return f"the GPU has compute capability {found[0]}.{found[1]}; they need {'.'.join(map(str, LEAST_CAPABILITY))}"
    return ""


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
