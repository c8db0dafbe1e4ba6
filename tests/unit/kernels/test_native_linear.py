"""The native few-rows linear against float64, for every instruction set that was compiled and runs here."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gemmakit.pytorch.kernels import cpu, linear, linear_plan
from gemmakit.pytorch.kernels.linear import MAX_ROWS, MIN_WEIGHT

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"needs the compiled kernels: {cpu.why_not()}")

BEST_FIRST = ["avx512bf16", "avx512", "avx2", "neon"]


def instruction_sets():
    """What was compiled and this processor runs: the one in use and those behind it."""
    used = cpu.instruction_set()
    behind = BEST_FIRST[BEST_FIRST.index(used) :] if used in BEST_FIRST else []
    return [isa for isa in behind if hasattr(cpu.library(), f"linear_rows_{isa}")]


def call(isa, x, weight, bias, threads):
    """One instruction set's kernel, whichever the dispatcher would take."""
    function = getattr(cpu.library(), f"linear_rows_{isa}")
    function.argtypes = cpu.library().gemmakit_linear_rows.argtypes
    (M, I), O = x.shape, weight.shape[0]
    y = torch.empty(M, O, dtype=x.dtype)
    wide = torch.empty(M * I)
    kind = 0 if x.dtype == torch.bfloat16 else 1
    pointers = [t if t is None else ctypes.c_void_p(t.data_ptr()) for t in (weight, x, wide, bias, y)]
    assert function(kind, *pointers, M, O, I, threads) == 0
    return y


def shifted(t):
    """The same numbers two bytes further, so that no vector load is aligned."""
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_every_kernel_is_the_rounded_float64_product(isa, dtype, rows):
    # Rounding to the output format moves a number by half a unit in the last place; the float32 sums add I * 2^-24 of
    # the absolute products at most.
    unit = torch.finfo(dtype).eps / 2
    g = torch.Generator().manual_seed(rows)
    for O, I in [(1, 1), (5, 31), (7, 32), (130, 257), (9, 2051), (67, 64)]:
        x = shifted(torch.randn(rows, I, generator=g).to(dtype))
        w = shifted(torch.randn(O, I, generator=g).to(dtype))
        b = torch.randn(O, generator=g).to(dtype)
        for bias in (None, b):
            exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
            room = exact.abs() * unit + F.linear(x.double().abs(), w.double().abs()) * I * 2.0**-24 + 1e-7
            for threads in (1, 2):
                got = call(isa, x, w, bias, threads).double()
                assert ((got - exact).abs() <= room * 1.01).all(), (O, I, bias is not None, threads)


@pytest.mark.parametrize("isa", instruction_sets())
def test_nan_and_infinity_pass_through(isa):
    w = torch.ones(3, 64, dtype=torch.bfloat16)
    w[1, 40], w[2, 5] = float("nan"), float("inf")
    y = call(isa, torch.ones(1, 64, dtype=torch.bfloat16), w, None, 1)
    assert y[0, 0] == 64
    assert y[0, 1].isnan()
    assert y[0, 2].isinf()


def test_the_seam_gives_what_torch_gives_on_a_large_weight():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 1056, generator=g).bfloat16()
    x = torch.randn(2, 3, 1056, generator=g).bfloat16()
    with torch.no_grad():
        got, expected = linear(x, w), F.linear(x, w)
    assert "native" in linear_plan(w)
    # Two ways to add up the same products: one unit in the last place where the sums fall on either side of a half.
    torch.testing.assert_close(got.float(), expected.float(), rtol=2**-7, atol=2**-7)


def test_gradients_small_weights_and_many_rows_stay_with_torch():
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(str(func))
            return func(*args, **(kwargs or {}))

    def native(x, w, grad):
        with torch.set_grad_enabled(grad), Seen() as seen:
            linear(x, w)
        return any("linear_rows" in op for op in seen.ops)

    large = torch.zeros(MIN_WEIGHT // 1024, 1024, dtype=torch.bfloat16)
    row = torch.zeros(1, 1024, dtype=torch.bfloat16)
    assert native(row, large, grad=False)
    assert not native(row, large, grad=True)
    assert not native(row, large[:-1], grad=False)
    assert not native(row.expand(MAX_ROWS + 1, -1).contiguous(), large, grad=False)
    assert not native(row.float(), large.float(), grad=False)
