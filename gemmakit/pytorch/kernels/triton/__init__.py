"""The CUDA kernels, written in Triton: each file of kernels has its plain-torch form in reference.py.

Importing this package needs no Triton; asking for a kernel does. Nothing here was tuned by trial on a device unless
tuning.py says so beside the number.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

# Below 8.0 there is neither bfloat16 nor an asynchronous copy, and Triton no longer supports them.
LEAST_CAPABILITY = (8, 0)


def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`. The CPU counts under TRITON_INTERPRET=1, for tests."""
    return not why_not(device)


@functools.cache
def why_not(device: torch.device | None = None) -> str:
    """Why the kernels do not run on `device` (default: the current GPU), in words; empty when they do."""
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
