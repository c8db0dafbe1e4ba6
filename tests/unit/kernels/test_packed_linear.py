"""Products with 8- and 4-bit weights: every instruction set's kernels within their stated error of float64."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import FORMATS, runnable, shifted, using
from packed_weights import STEPS, exact, most_of, random_packed, room

from gemmakit.native.ids import WeightFormat
from gemmakit.pytorch.kernels import cpu, linear, linear_packed, linear_plan
from gemmakit.pytorch.kernels.cpu import MAX_ROWS
from gemmakit.pytorch.kernels.linear import FEW_ROWS, takes_many
from gemmakit.pytorch.kernels.packed import PackedWeight, dequantize, pack, unpack

linear_module = sys.modules["gemmakit.pytorch.kernels.linear"]  # the package has a function of its name
native = pytest.mark.skipif(cpu.library() is None, reason=f"needs the compiled kernels: {cpu.decision().why}")
SHAPES = [(1, 1), (5, 31), (7, 32), (13, 257), (9, 2051), (67, 64), (6, 512), (5, 1100), (4, 544)]


def project(x, packed, bias=None):
    return cpu.project(x, [cpu.matrix(packed, bias)])[0]


@native
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("scheme", STEPS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_kernel_keeps_its_stated_error(isa, scheme, dtype):
    for O, I in SHAPES:
        packed = random_packed(scheme, O, I)
        packed = packed._replace(codes=shifted(packed.codes))
        for rows in range(1, MAX_ROWS + 1):
            x = shifted(torch.randn(rows, I).to(dtype))
            expected, allowed = exact(x, packed), room(x, packed, dtype)
            for threads in (1, 2):
                with using(isa, threads):
                    got = project(x, packed).double()
                assert ((got - expected).abs() <= allowed).all(), (O, I, rows, threads)


@native
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(runnable() or [None]),
    st.sampled_from(STEPS),
    st.integers(1, 40),
    st.integers(1, 700),
    st.integers(1, MAX_ROWS),
    st.integers(-25, 30),
    st.booleans(),
)
def test_shapes_and_sizes_of_x_of_all_sorts(isa, scheme, O, I, rows, size, outlier):
    packed = random_packed(scheme, O, I, seed=O * I)
    x = torch.randn(rows, I, generator=torch.Generator().manual_seed(size)) * 10.0**size
    if outlier:
        x[0, I // 2] *= 1e4
    with using(isa, 1):
        got = project(x, packed).double()
    # The stated error needs float64: 1e30 times a row's weights still fits float32.
    assert ((got - exact(x, packed)).abs() <= room(x, packed, torch.float32)).all()


@native
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("scheme", STEPS)
def test_whole_numbers_come_out_exactly(isa, scheme):
    """A block whose largest is 32767 or 127 keeps its whole numbers; two such sums stay below 2^24, float32's limit."""
    packed = random_packed(scheme, 33, 640)
    packed = packed._replace(scale=torch.ones_like(packed.scale))
    x = torch.zeros(4, 20, 32)
    for block in (3, 17):  # within and after the vectors' steps of several blocks
        x[:, block] = torch.randint(-3, 4, (4, 32)).float()
        x[:, block, block] = most_of(packed)
    x = x.view(4, 640)
    with using(isa, 2):
        assert torch.equal(project(x, packed).double(), exact(x, packed))


@native
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("scheme", STEPS)
def test_zeros_give_zero_and_the_bias_is_added_in_float32(isa, scheme):
    packed = random_packed(scheme, 33, 257)
    bias = torch.randn(33).bfloat16()
    with using(isa, 1):
        got = project(torch.zeros(2, 257).bfloat16(), packed, bias)
    assert torch.equal(got, bias.expand(2, -1))


@native
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("scheme", STEPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not(isa, scheme, bad):
    packed = random_packed(scheme, 40, 300)
    x = torch.randn(3, 300)
    x[1, 290] = bad
    with using(isa, 2):
        got, alone = project(x, packed), project(x[[0, 2]], packed)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], alone)


@native
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("scheme", STEPS)
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, scheme):
    """So speculation, which checks several tokens at once, finds the numbers of one at a time."""
    packed = random_packed(scheme, 40, 1100)
    x = torch.randn(FEW_ROWS[packed.bits], 1100).bfloat16()
    with using(isa, 2), torch.no_grad():
        most = MAX_ROWS if takes_many(packed, x.dtype) or cpu.multiplies_tiles(x.dtype) else len(x)
        alone = torch.cat([project(row, packed) for row in x.split(1)])
        for rows in range(2, most + 1):
            assert torch.equal(linear_packed(x[:rows], packed), alone[:rows])


@native
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("scheme", STEPS)
@pytest.mark.parametrize("I", [96, 640, 1120])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_output_does_not_depend_on_the_weights_of_the_next(isa, scheme, I, rows):
    """Where a row ends within a step of the kernel, the step may read on, to where the next row's numbers lie."""
    packed, x = random_packed(scheme, 6, I), torch.randn(rows, I)
    with using(isa, 1):
        (expected,) = cpu.project(x, [cpu.matrix(packed)])
        for number in (torch.nan, torch.inf):
            scale = packed.scale.clone()
            scale[3] = number
            (got,) = cpu.project(x, [cpu.matrix(packed._replace(scale=scale))])
            assert not got[:, 3].isfinite().any()
            others = [0, 1, 2, 4, 5]
            assert torch.equal(got[:, others], expected[:, others])
        alone = packed._replace(codes=packed.codes[:3].clone(), scale=packed.scale[:3].clone(),
                                zero=None if packed.zero is None else packed.zero[:3].clone())  # fmt: skip
        (got,) = cpu.project(x, [cpu.matrix(alone)])
        assert torch.equal(got, expected[:, :3])


def test_a_residual_is_added_after_the_product_was_rounded():
    packed = random_packed("int4-32", 50, 96)
    x, residual = torch.randn(2, 96).bfloat16(), torch.randn(2, 50).bfloat16()
    assert torch.equal(cpu.project(x, [cpu.matrix(packed)], residual)[0], project(x, packed) + residual)


@native
def test_weights_of_different_formats_may_share_x():
    x = torch.randn(3, 320).bfloat16()
    ws = [*(random_packed(s, 40, 320) for s in STEPS), torch.randn(20, 320), torch.randn(20, 320).bfloat16()]
    for some in (ws[::2], ws[1::2]):
        for w, y in zip(some, cpu.project(x, [cpu.matrix(w) for w in some]), strict=True):
            assert torch.equal(y, project(x, w))


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("scheme", ["int5-32", "int5-96", "int6-32", "int6-128"])
@pytest.mark.parametrize("size", [(1, 1), (7, 45), (70, 96), (300, 320), (9, 2048)])
def test_codes_of_5_and_6_bits_are_multiplied_as_the_same_codes_in_bytes(isa, scheme, size):
    packed = random_packed(scheme, *size)
    in_bytes = packed._replace(codes=unpack(packed), format=WeightFormat.INT8_GROUPS)
    with using(isa, 1):
        for rows, bits in itertools.product((1, 2, 5, 8, 9, 30), (8, 16)):
            x = torch.randn(rows, size[1])
            a, b = (cpu.project(x, [cpu.matrix(w, None, bits)])[0] for w in (packed, in_bytes))
            assert torch.equal(a, b)


@pytest.mark.parametrize("scheme", STEPS)
@pytest.mark.parametrize("dtype", [*FORMATS, torch.float64])
@pytest.mark.parametrize("rows", [1, max(FEW_ROWS.values()) + 1])
def test_the_seam_is_close_to_dequantize_and_multiply(scheme, dtype, rows):
    packed, x, bias = random_packed(scheme, 70, 300), torch.randn(rows, 300).to(dtype), torch.randn(70).to(dtype)
    x.requires_grad_()
    y = linear_packed(x, packed, bias)
    gradient = torch.randn(rows, 70).to(dtype)
    y.backward(gradient)
    w = dequantize(packed).double()
    # 16-bit formats: half a unit each for the panel, x or y, and the bias. float32: 16-bit activations.
    unit = {torch.float64: 2.0**-50, torch.float32: 2.0**-14}.get(dtype, 2 * torch.finfo(dtype).eps)
    expected = F.linear(x.double(), w, bias.double())
    assert y.dtype == dtype
    assert ((y - expected).abs() <= unit * (x.double().abs() @ w.abs().T + bias.abs())).all()
    assert ((x.grad - gradient.double() @ w).abs() <= unit * (gradient.double().abs() @ w.abs())).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3), ()])
def test_leading_dimensions_stay(shape):
    packed = random_packed("int4-32", 7, 64)
    assert linear_packed(torch.randn(*shape, 64), packed).shape == (*shape, 7)
    assert linear_packed(torch.randn(*shape, 64), packed, torch.ones(7)).shape == (*shape, 7)


@pytest.mark.parametrize("scheme", ["int8", "int4-32"])
def test_it_is_an_operator_that_compiles_and_exports(scheme):
    packed = random_packed(scheme, 7, 64)
    x = torch.randn(2, 64, requires_grad=True)
    codes, scale, zero, *facts = packed
    facts = [int(fact) for fact in facts]
    torch.library.opcheck(torch.ops.gemmakit.linear_packed.default, (x, codes, scale, zero, None, *facts))

    class Layer(torch.nn.Module):
        def forward(self, x):
            return linear_packed(x, packed)

    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), linear_packed(x, packed))
    exported = torch.export.export(Layer(), (x.detach(),)).module()
    assert torch.equal(exported(x.detach()), linear_packed(x, packed).detach())


def test_scales_that_no_kernel_reads_are_still_computed_with():
    packed = random_packed("int4-32", 7, 64)
    cast = packed._replace(scale=packed.scale.float())
    x = torch.randn(2, 64)
    assert not cpu.reads(cast)
    assert "float32" in linear_plan(cast).why or cpu.library() is None
    torch.testing.assert_close(linear_packed(x, cast), F.linear(x, dequantize(cast)))


def test_without_the_library_it_is_torch_and_says_so_once(monkeypatch):
    packed, x = random_packed("int8", 7, 64), torch.randn(2, 64)
    monkeypatch.setattr("gemmakit.native._loaded", lambda: (None, "not there"))
    linear_module._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="slow.*not there") as warned:
        first, second = linear_packed(x, packed), linear_packed(x, packed)
    assert len(warned) == 1
    assert torch.equal(first, F.linear(x, dequantize(packed))) and torch.equal(first, second)
    assert "not there" in linear_plan(packed).why
    linear_module._warn_once.cache_clear()


@native
def test_the_plan_names_bits_and_instructions():
    for scheme in STEPS:
        packed = random_packed(scheme, 7, 64)
        many = f"; beyond {FEW_ROWS[packed.bits]} rows in float32" if cpu.multiplies_floats() else ""
        many = "; beyond 8 rows activations in 8 bits" if takes_many(packed, torch.float32) else many
        many = "; activations in 8 bits" if packed.decode_activation_bits == 8 else many
        if cpu.multiplies_tiles(torch.bfloat16):
            many = (many + "," if many else ";") + " beyond 8 rows of bfloat16 by tiles"
        assert str(linear_plan(packed)) == f"native {cpu.instruction_set()} int{packed.bits}{many}"


def test_a_group_that_is_the_row_needs_no_multiple_of_32():
    codes = torch.randint(0, 16, (3, 45))
    packed = PackedWeight(
        pack(codes), torch.ones(3, 1).half(), torch.full((3, 1), 8, dtype=torch.uint8), 45, 45, WeightFormat.INT4
    )
    x = torch.randn(1, 45)
    wanted = x.double() @ (codes - 8).double().T
    assert ((linear_packed(x, packed) - wanted).abs() <= room(x, packed, torch.float32)).all()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_plan_says_is_what_runs(dtype, monkeypatch):
    """Of every format, with and without the library and where no kernel reads the scales: native calls are counted."""
    called = []
    project = cpu.project
    monkeypatch.setattr(cpu, "project", lambda *arguments: called.append(1) or project(*arguments))
    monkeypatch.setattr(linear_module, "MIN_WEIGHT", 8 * 64)
    dense = torch.randn(8, 64).to(dtype)
    packed = [random_packed(scheme, 8, 64) for scheme in STEPS]
    packed += [packed[-1]._replace(scale=packed[-1].scale.float()), packed[0]._replace(activation_bits=16)]

    def runs_native(weight, rows):
        called.clear()
        with torch.no_grad():
            x = torch.randn(rows, 64).to(dtype)
            linear(x, weight) if isinstance(weight, torch.Tensor) else linear_packed(x, weight)
        return bool(called)

    for there in (True, False):
        if not there:
            monkeypatch.setattr("gemmakit.native._loaded", lambda: (None, "not there"))
        for weight in (dense, dense[:4], *packed):
            assert runs_native(weight, 1) == linear_plan(weight).path.startswith("native")
            if isinstance(weight, PackedWeight):
                path = linear_plan(weight).path
                by_tiles = cpu.multiplies_tiles(dtype)
                said = "by tiles" in path if by_tiles else "in 8 bits" in path or "in float32" in path
                assert runs_native(weight, 33) == said
