"""The native CPU kernels: native.so, compiled from the C++ beside this file when the package was installed.

Both backends call it: PyTorch through ctypes (gemmakit/pytorch/kernels/cpu.py), XLA by itself, told of it by
gemmakit/flax/products.py. Loading it imports neither.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from gemmakit.native.sources import digest

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
AGAIN = "(install gemmakit again, in a checkout by: pip install -e .)"


def library() -> ctypes.CDLL | None:
    return _loaded()[0]


def absence() -> str:
    """Why there is no library; empty where there is one."""
    return _loaded()[1]


def instruction_set() -> str | None:
    """The instruction set in use, or None: amx, avx512bf16, avx512vnni, avx512, avxvnni, avx2, neondot or neon."""
    found = library()
    return None if found is None else found.gemmakit_instruction_set().decode()


def use_instruction_set(isa: str | None) -> bool:
    """Use this instruction set from now on (None: the best); False when it was not compiled or does not run here."""
    found = library()
    return found is not None and not found.gemmakit_use_instruction_set(None if isa is None else isa.encode())


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    if os.environ.get("GEMMAKIT_NATIVE") == "0":
        return None, "switched off by GEMMAKIT_NATIVE=0"
    path = Path(__file__).with_name("native.so")
    if not path.exists():
        return None, "not compiled: there was no C++ compiler when gemmakit was installed (reinstall with one)"
    try:
        _share_threads()
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError, ValueError) as error:
        return None, f"{path.name} does not load: {error} {AGAIN}"
    if library.gemmakit_sources().decode() != digest(path.parent):
        return None, f"{path.name} was compiled from other sources than those beside it {AGAIN}"
    if library.gemmakit_instruction_set() is None:
        wanted = os.environ.get("GEMMAKIT_ISA")
        sort = f"the instruction set GEMMAKIT_ISA={wanted}" if wanted else "none of AVX2, AVX-512, NEON"
        return None, f"has {sort} neither compiled nor in this processor" if wanted else f"this processor has {sort}"
    return library, ""


def _declare(library: ctypes.CDLL) -> None:
    library.gemmakit_sources.restype = ctypes.c_char_p
    library.gemmakit_instruction_set.restype = ctypes.c_char_p
    library.gemmakit_use_instruction_set.argtypes = [ctypes.c_char_p]
    library.gemmakit_project.argtypes = [_POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT]
    library.gemmakit_expand.argtypes = [_POINTER, _LONG, _LONG, _INT, _POINTER, _INT]
    library.gemmakit_rms_norm.argtypes = [_INT, _POINTER, _LONG, _LONG, *[_POINTER] * 3, _INT]
    library.gemmakit_gated.argtypes = [_INT, _INT, *[_POINTER] * 3, _LONG, _INT]
    library.gemmakit_norm_project.argtypes = [_POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT]
    library.gemmakit_norm_gate_up.argtypes = [_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT]
    library.gemmakit_project_norm_add.argtypes = [_POINTER, _INT, _POINTER, _INT, *[_POINTER] * 3, _INT]
    library.gemmakit_attend.argtypes = [_POINTER]
    library.gemmakit_read_memory.argtypes = [_POINTER, _LONG, _POINTER, _INT]


def _share_threads() -> None:
    """Let the library find torch's own OpenMP threads instead of starting others, whatever its wheel calls their file.

    On x86-64 that is libgomp.so.1, as everywhere; Linux wheels for aarch64 have a name of their own in torch.libs, and
    those for macOS bring the only libomp there is. Where torch is not imported, its file is loaded all the same:
    whoever imports it later finds the same threads.
    """
    torch, imported = find_spec("torch"), "torch" in sys.modules
    if torch is None or torch.origin is None:
        return
    folder, flags = Path(torch.origin).parent, getattr(os, "RTLD_GLOBAL", 0)
    if imported:
        flags |= getattr(os, "RTLD_NOLOAD", 0)
    for place in (folder / "lib", folder.with_name("torch.libs")):
        for file in sorted(place.glob("lib*omp*")):
            if file.name.startswith(("libgomp", "libomp", "libiomp")):
                with suppress(OSError):  # a file that torch has not loaded
                    ctypes.CDLL(str(file), mode=flags)
                    if not imported:
                        return
