"""The native CPU kernels: native.so, compiled from the C++ beside this file when the package was installed."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    if os.environ.get("GEMMAKIT_NATIVE") == "0":
        return None, "switched off by GEMMAKIT_NATIVE=0"
    path = Path(__file__).with_name("native.so")
    if not path.exists():
        return None, "not compiled: there was no C++ compiler when gemmakit was installed (reinstall with one)"
    try:
        # torch is imported by now, so the library finds torch's own OpenMP threads instead of starting others.
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    library.gemmakit_isa.restype = ctypes.c_char_p
    library.gemmakit_linear_rows.argtypes = [_INT, *[_POINTER] * 5, _INT, _LONG, _LONG, _INT]
    if library.gemmakit_isa() is None:
        return None, "this processor has none of AVX2, AVX-512, NEON"
    return library, ""


def library() -> ctypes.CDLL | None:
    return _loaded()[0]


def why_not() -> str:
    """Why there is no library; empty when there is one."""
    return _loaded()[1]


def instruction_set() -> str | None:
    """The instruction set in use: avx512bf16, avx512, avx2, neon; None without the library."""
    found = library()
    return None if found is None else found.gemmakit_isa().decode()
