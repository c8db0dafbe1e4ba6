"""The native few-rows product of float weights against float64, for every instruction set compiled that runs here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import FORMATS, runnable, shifted, using
from torch.utils._python_dispatch import TorchDispatchMode

from gemmakit import native
from gemmakit.pytorch.kernels import cpu, linear, linear_plan
from gemmakit.pytorch.kernels.cpu import MAX_ROWS
from gemmakit.pytorch.kernels.linear import MIN_WEIGHT, PAIR_ROWS, TILE_ROWS, takes_any_rows
from gemmakit.pytorch.kernels.panels import product_dtype

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"needs the compiled kernels: {cpu.decision().why}")


def room(x, w, dtype):
    """Rounding to the output format moves a number by half a unit in the last place; the float32 sums add I * 2^-24 of
    the absolute products at most."""
    exact = F.linear(x.double(), w.double())
    sums = F.linear(x.double().abs(), w.double().abs()) * x.shape[1] * 2.0**-24
    return exact.abs() * torch.finfo(dtype).eps / 2 + sums + 1e-7


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_every_kernel_is_the_rounded_float64_product(isa, dtype, rows):
    g = torch.Generator().manual_seed(rows)
    for O, I in [(1, 1), (5, 31), (7, 32), (130, 257), (9, 2051), (67, 64)]:
        x = shifted(torch.randn(rows, I, generator=g).to(dtype))
        w = shifted(torch.randn(O, I, generator=g).to(dtype))
        b = torch.randn(O, generator=g).to(dtype)
        for bias in (None, b):
            exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
            allowed = room(x, w, dtype) + (0 if bias is None else bias.double().abs() * torch.finfo(dtype).eps)
            for threads in (1, 2):
                with using(isa, threads):
                    got = cpu.project(x, [cpu.matrix(w, bias)])[0].double()
                assert ((got - exact).abs() <= allowed * 1.01).all(), (O, I, bias is not None, threads)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("dtype", FORMATS)
def test_many_rows_are_the_rounded_float64_product_too(isa, dtype):
    g = torch.Generator().manual_seed(0)
    # Rows: the most that meet a weight as it lies, fewer than a tile beyond, two panels' worth. Weights: one panel and
    # less, several with a rest; inputs: less than a vector, several chunks with a rest.
    for rows, O, I in [(16, 50, 1029), (17, 5, 31), (25, 130, 2051), (101, 49, 33)]:
        x = shifted(torch.randn(rows, I, generator=g).to(dtype))
        w = shifted(torch.randn(O, I, generator=g).to(dtype))
        b, residual = torch.randn(O, generator=g).to(dtype), torch.randn(rows, O, generator=g).to(dtype)
        exact, unit = F.linear(x.double(), w.double(), b.double()), torch.finfo(dtype).eps
        allowed = room(x, w, dtype) + b.double().abs() * unit
        with using(isa, 2):
            y, added = (cpu.project(x, [cpu.matrix(w, b)], r)[0] for r in (None, residual))
        assert ((y.double() - exact).abs() <= allowed * 1.01).all(), (rows, O, I)
        assert torch.equal(added, y + residual)


def turned(w, bias=None):
    """The Matrix of a weight (out, in) that lies as (in, out), and what it points into."""
    lies = shifted(w.t().contiguous())
    m = cpu.matrix(lies, bias)
    m.out, m.in_, m.turned = *w.shape, 1
    return m, lies


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("weight_dtype", FORMATS)
def test_a_weight_that_lies_by_inputs_gives_the_rounded_float64_product(isa, dtype, weight_dtype):
    """Few rows meet it as it lies and many by panels: up to a part of the sums, beyond it, and beyond a panel."""
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 1, 1), (1, 5, 31), (2, 600, 257), (16, 50, 1029), (17, 5, 31), (25, 130, 2051), (101, 49, 33)]
    for rows, O, I in shapes:
        x = shifted(torch.randn(rows, I, generator=g).to(dtype))
        w = torch.randn(O, I, generator=g).to(weight_dtype)
        b, residual = torch.randn(O, generator=g).to(dtype), torch.randn(rows, O, generator=g).to(dtype)
        (m, lies), exact = turned(w, b), F.linear(x.double(), w.double(), b.double())
        allowed = room(x, w, dtype) + b.double().abs() * torch.finfo(dtype).eps
        for threads in (1, 2):
            with using(isa, threads):
                y, added = (cpu.project(x, [m], r)[0] for r in (None, residual))
            assert ((y.double() - exact).abs() <= allowed * 1.01).all(), (rows, O, I, threads)
            assert torch.equal(added, y + residual)
        del lies


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("dtype", FORMATS)
def test_few_rows_of_a_weight_that_lies_by_inputs_are_each_as_alone(isa, dtype):
    x, w = torch.randn(16, 300).to(dtype), torch.randn(1050, 300).to(dtype)
    m, lies = turned(w)
    with using(isa, 2):
        all_of_them, other = cpu.project(x, [m, cpu.matrix(w)])
        alone = [cpu.project(x[i : i + 1], [m])[0] for i in range(len(x))]
        assert torch.equal(other, cpu.project(x, [cpu.matrix(w)])[0])
    assert torch.equal(all_of_them, torch.cat(alone)) and len(lies)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("dtype", FORMATS)
def test_weights_that_share_x_give_what_each_gives_alone(isa, dtype):
    x = torch.randn(3, 96).to(dtype)
    ws = [torch.randn(O, 96).to(dtype) for O in (40, 300, 1)]
    with using(isa, 2):
        together = cpu.project(x, [cpu.matrix(w) for w in ws])
        for w, y in zip(ws, together, strict=True):
            assert torch.equal(y, cpu.project(x, [cpu.matrix(w)])[0])


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_residual_is_added_after_the_product_was_rounded(isa, dtype):
    x, w, residual = torch.randn(2, 96).to(dtype), torch.randn(50, 96).to(dtype), torch.randn(2, 50).to(dtype)
    with using(isa, 1):
        alone, added = (cpu.project(x, [cpu.matrix(w)], r)[0] for r in (None, residual))
    assert torch.equal(added, alone + residual)


@pytest.mark.parametrize("isa", runnable())
def test_nan_and_infinity_pass_through(isa):
    w = torch.ones(3, 64, dtype=torch.bfloat16)
    w[1, 40], w[2, 5] = float("nan"), float("inf")
    m, lies = turned(w)
    for rows in (1, 20):
        with using(isa, 1):
            ys = cpu.project(torch.ones(rows, 64, dtype=torch.bfloat16), [cpu.matrix(w), m])
        for y in ys:
            assert (y[:, 0] == 64).all()
            assert y[:, 1].isnan().all()
            assert y[:, 2].isinf().all()
    assert len(lies)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_seam_gives_what_torch_gives_on_a_large_weight(dtype):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 1056, generator=g).to(dtype)
    x = torch.randn(2, 3, 1056, generator=g).to(dtype)
    with torch.no_grad():
        got, expected = linear(x, w), F.linear(x, w)
    assert "native" in linear_plan(w).path
    exact, allowed = F.linear(x.double(), w.double()), room(x, w, dtype)
    assert ((got - exact).abs() <= allowed * 1.01).all()
    # torch may sum in another order and round on its way: two units in the last place.
    assert ((got - expected).abs() <= 4 * allowed).all()


def ops(call):
    """The operators that a call reaches."""

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        call()
    return seen.ops


def test_gradients_small_weights_and_many_rows_stay_with_torch():
    def native(x, w, grad):
        with torch.set_grad_enabled(grad):
            return any("linear_rows" in op for op in ops(lambda: linear(x, w)))

    large = torch.zeros(MIN_WEIGHT // 1024, 1024)
    row = torch.zeros(1, 1024)
    for dtype in FORMATS:
        assert native(row.to(dtype), large.to(dtype), grad=False)
        assert not native(row.to(dtype), large.to(dtype), grad=True)
        assert native(row.to(dtype), large[:-1].to(dtype), grad=False) == takes_any_rows(large.to(dtype), dtype)
    many = row.expand(MAX_ROWS + 1, -1).contiguous()
    assert not native(many, large, grad=False)
    bf16 = torch.bfloat16
    panels = product_dtype(bf16) != bf16
    most = TILE_ROWS if cpu.multiplies_tiles(bf16) else PAIR_ROWS if cpu.multiplies_pairs() else MAX_ROWS
    for rows, own in ((MAX_ROWS + 1, most > MAX_ROWS), (most, True), (most + 1, False)):
        x = row.expand(rows, -1).to(bf16)
        assert native(x, large.to(bf16), grad=False) == (own or panels)
        assert not native(x, large.to(bf16), grad=True)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4099, 1 << 19])
def test_touch_reads_every_byte(size):
    buffer = torch.randint(0, 256, (size + 3,), dtype=torch.uint8)[3:]
    whole = size // (1 << 18) * (1 << 18)  # read in pieces: each sums its own words, then its last bytes
    words = [buffer[:whole], buffer[whole:]]
    expected = sum(
        int.from_bytes(bytes(p[i : i + 8].tolist()), sys.byteorder) for p in words for i in range(0, len(p) // 8 * 8, 8)
    )
    expected += sum(int(b) for b in words[1][len(words[1]) // 8 * 8 :])
    assert cpu.read_memory(buffer) == expected % 2**64


def test_an_instruction_set_can_be_asked_for():
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).gemmakit_instruction_set; "
    code += "f.restype = ctypes.c_char_p; print(f())"

    def said(isa):
        command = [sys.executable, "-c", code, cpu.library()._name]
        done = subprocess.run(
            command, env=os.environ | {"GEMMAKIT_ISA": isa}, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    for isa in runnable():
        assert said(isa) == f"b'{isa}'"
    assert said("mmx") == "None"
    assert said("") == f"b'{runnable()[0]}'"


def test_the_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("GEMMAKIT_NATIVE", "0")
    assert native._loaded.__wrapped__() == (None, "switched off by GEMMAKIT_NATIVE=0")


def test_a_library_of_other_sources_is_left_alone_and_says_what_to_do(monkeypatch):
    monkeypatch.delenv("GEMMAKIT_NATIVE", raising=False)
    monkeypatch.setattr(native, "digest", lambda folder: "another")
    library, why = native._loaded.__wrapped__()
    assert library is None
    assert "other sources" in why and "pip install -e ." in why


def test_every_byte_and_name_of_the_sources_counts(tmp_path):
    folder, installed = tmp_path / "native", Path(native.__file__).parent
    shutil.copytree(installed, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    seen = {native.digest(installed)}
    assert native.digest(folder) in seen
    for file in (*folder.glob("*.h"), *folder.glob("*.cpp"), folder / "ids.py"):
        text = file.read_bytes()
        file.write_bytes(text[:-2])
        seen.add(native.digest(folder))
        file.write_bytes(text)
    (folder / "native.h").rename(folder / "natives.h")
    assert len(seen | {native.digest(folder)}) == 3 + len([*folder.glob("*.h"), *folder.glob("*.cpp")])
