"""Expanding a weight panel by panel: exactly what dequantize gives, in any format, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import FORMATS, runnable, using
from packed_weights import SCHEMES, random_packed

from gemmakit.pytorch.kernels import cpu, linear, panels
from gemmakit.pytorch.kernels.linear import MIN_WEIGHT
from gemmakit.pytorch.kernels.packed import dequantize

native = pytest.mark.skipif(cpu.library() is None, reason=f"needs the compiled kernels: {cpu.decision().why}")


@native
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_expanding_is_dequantizing(isa, scheme, dtype):
    for O, I in [(1, 1), (5, 31), (9, 32), (40, 257), (70, 1100)]:
        packed = random_packed(scheme, O, I)
        for rows in (range(O), range(O // 3, O // 2)):
            room = torch.full((len(rows) + 1, I), 7.0, dtype=dtype)
            with using(isa, 2):
                cpu.expand(cpu.matrix(packed), rows, room[:-1])
            assert torch.equal(room[:-1], dequantize(packed, dtype)[rows.start : rows.stop])
            assert (room[-1] == 7).all()


@native
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_float_weights_are_converted_as_torch_does(isa, dtype, to):
    w = torch.randn(9, 77).to(dtype)
    w[0, :3] = torch.tensor([float("nan"), float("inf"), 1e-30])
    room = torch.empty(9, 77, dtype=to)
    with using(isa, 1):
        cpu.expand(cpu.matrix(w), range(9), room)
    assert torch.equal(room.nan_to_num(1.5), w.to(to).nan_to_num(1.5))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_panels_of_any_height_make_one_product(scheme, monkeypatch):
    packed, x, bias = random_packed(scheme, 200, 96), torch.randn(30, 96), torch.randn(200)
    monkeypatch.setattr(panels, "PANEL_BYTES", 1)  # the least: 64 rows
    assert len(list(panels.panels(packed, torch.float32))) == 4
    expected = F.linear(x.double(), dequantize(packed).double(), bias.double())
    # One float32 product of 96 numbers, whose order of summation is torch's.
    allowed = 96 * 2.0**-24 * (F.linear(x.abs(), dequantize(packed).abs()) + bias.abs())
    assert ((panels.multiply(x, packed, bias) - expected).abs() <= allowed).all()
    gradient = torch.randn(30, 200)
    allowed = 200 * 2.0**-24 * (gradient.abs() @ dequantize(packed).abs())
    assert (
        (panels.multiply_back(gradient, packed) - gradient.double() @ dequantize(packed).double()).abs() <= allowed
    ).all()


@native
@pytest.mark.parametrize("rows", [9, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulated_formats_are_multiplied_in_float32(rows, dtype, monkeypatch):
    """On a processor without 16-bit products: rounded once, from exact products."""
    module = __import__("importlib").import_module("gemmakit.pytorch.kernels.linear")
    for where in (module, panels):
        monkeypatch.setattr(where, "product_dtype", lambda dtype: torch.float32)
    w, x = torch.randn(MIN_WEIGHT // 512, 512).to(dtype), torch.randn(rows, 512).to(dtype)
    b = torch.randn(len(w)).to(dtype)
    with torch.no_grad():
        got = linear(x, w, b)
    expected = F.linear(x.double(), w.double(), b.double())
    allowed = expected.abs() * torch.finfo(dtype).eps / 2 + 512 * 2.0**-24 * F.linear(x.float().abs(), w.float().abs())
    assert got.dtype == dtype
    assert ((got - expected).abs() <= allowed * 1.01 + 1e-6).all()


def test_what_x_is_multiplied_in():
    assert panels.product_dtype(torch.float32) == torch.float32
    assert panels.product_dtype(torch.float64) == torch.float64
    assert panels.product_dtype(torch.bfloat16) in (torch.bfloat16, torch.float32)
