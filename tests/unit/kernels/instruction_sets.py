"""Which instruction sets the tests go through, and how they use one."""

from contextlib import contextmanager

import torch

import gemmakit.native

BEST_FIRST = ["amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "neondot", "neon"]
FORMATS = [torch.bfloat16, torch.float16, torch.float32]


def runnable():
    """What was compiled and this processor runs; empty without the library."""
    found = [isa for isa in BEST_FIRST if gemmakit.native.use_instruction_set(isa)]
    gemmakit.native.use_instruction_set(None)
    return found


@contextmanager
def using(isa, threads):
    """One instruction set's kernels, whichever the dispatcher would take."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert gemmakit.native.use_instruction_set(isa)
    try:
        yield
    finally:
        gemmakit.native.use_instruction_set(None)
        torch.set_num_threads(before)


def shifted(t):
    """The same numbers one element further, so that no vector load is aligned."""
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)
