"""Every matrix-times-rows kernel equals its plain form. Run by test_interpreted.py, in Triton's interpreter.

What is allowed between two right answers: sums of float32 in another order (2^-22 of the sum of magnitudes), one
rounding to the dtype, and, behind a norm, one input whose norm was rounded the other way.
"""

import interpreting  # noqa: F401  before triton
import pytest
import torch
import torch.nn.functional as F

from gemmakit.errors import InputError
from gemmakit.native.ids import Activation, WeightFormat
from gemmakit.pytorch.kernels import reference
from gemmakit.pytorch.kernels.packed import PackedWeight, dequantize, pack, packed_format
from gemmakit.pytorch.kernels.triton import launch, tuning

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMS = ["plain", "int8 rows", "int8 g32", "int4 g32", "int4 g128", "int4 rows"]
EPS = 1e-6


def weight(form, O, I, dtype, seed=0):
    """A random weight of about 1 / sqrt(I), with zeros and scales that differ from group to group."""
    g = torch.Generator().manual_seed(seed)
    if form == "plain":
        return (torch.randn(O, I, generator=g) / I**0.5).to(dtype)
    group = I if form.endswith("rows") else int(form.split("g")[1])
    G = -(-I // group)
    scale = torch.rand(O, G, generator=g) + 0.5
    if form.startswith("int8"):
        codes = torch.randint(-127, 128, (O, I), generator=g, dtype=torch.int8)
        scale = scale / 73 / I**0.5
        return PackedWeight(
            codes, scale if G == 1 else scale.half(), None, I, group, packed_format(8, None if G == 1 else group)
        )
    codes = pack(torch.randint(0, 16, (O, I), generator=g))
    zero = torch.randint(0, 16, (O, G), generator=g, dtype=torch.uint8)
    return PackedWeight(codes, (scale / 5 / I**0.5).half(), zero, I, group, WeightFormat.INT4)


def random(*shape, dtype, seed=1, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_rounded_alike(y, expected, x, w, roundings=1, normed=False):
    """x, w: what the sums were made of."""
    exact = w.float() if isinstance(w, torch.Tensor) else dequantize(w)
    size = x.float().abs() @ exact.abs().T
    eps = torch.finfo(y.dtype).eps
    _, exponent = torch.frexp(torch.maximum(y.float().abs(), expected.float().abs()))
    spacing = torch.ldexp(torch.full_like(size, eps / 2), exponent)
    allowed = roundings * spacing + 2**-22 * size
    if normed and y.dtype != torch.float32:
        allowed += eps * (x.float().abs().amax(-1, keepdim=True) * exact.abs().amax(-1))
    difference = (y.float() - expected.float()).abs()
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    assert (difference <= allowed).all(), float((difference / allowed).max())


def check_project(form, dtype, M, I, outputs=(9, 4, 2), bias=False):
    x = random(M, I, dtype=dtype)
    ws = [weight(form, O, I, dtype, seed) for seed, O in enumerate(outputs)]
    bs = [random(O, dtype=dtype, seed=O) if bias and O != 4 else None for O in outputs]
    norm = launch.Norm(random(I, dtype=dtype, seed=3, scale=0.2), EPS)
    ys = launch.project(x, [launch.operand(w) for w in ws], bs, norm)
    h = reference.rms_norm(x, norm.weight, EPS)
    for y, w, b in zip(ys, ws, bs, strict=True):
        assert_rounded_alike(y, reference.linear(h, w, b), h, w, normed=True)


@pytest.mark.parametrize("M", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_norm_and_three_projections_equal_the_modules(form, dtype, M):
    check_project(form, dtype, M, 256)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("I", [40, 300, 2080])
def test_inputs_of_any_number(I, form):
    """Less than a block, more than a block, and not a whole number of groups."""
    check_project(form, torch.bfloat16, 2, I)


@pytest.mark.parametrize("form", FORMS)
def test_one_output_and_a_bias_for_some(form):
    check_project(form, torch.float16, 3, 96, outputs=(1, 4, 2), bias=True)


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 2, 5, 8])
@pytest.mark.parametrize("I", [64, 640, 2048, 3072])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_norm_and_three_projections_over_a_grid(form, dtype, I, M):
    check_project(form, dtype, M, I, outputs=(33, 8, 9))


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_projection_plus_residual_rounds_twice(form, dtype, M):
    """The projection is rounded, then its sum with the residual: the modules' two roundings, not one."""
    x, w, residual = random(M, 512, dtype=dtype), weight(form, 10, 512, dtype), random(M, 10, dtype=dtype, seed=5)
    y = launch.project(x, [launch.operand(w)], [None], residual=residual)[0]
    projected = reference.linear(x, w)
    assert_rounded_alike(y, residual + projected, x, w, roundings=2)
    once = (residual.float() + F.linear(x.float(), w.float() if form == "plain" else dequantize(w))).to(dtype)
    if dtype != torch.float32:  # most outputs show which of the two it was where they differ
        told = once != residual + projected
        assert (y[told] == (residual + projected)[told]).float().mean() > 0.8 if told.any() else True


@pytest.mark.parametrize("gain", [1.0, 2.0**-7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [40, 640, launch.MAX_DIM + 1])
def test_a_norm_plus_residual_rounds_twice(D, dtype, gain):
    x, residual = random(3, 2, D, dtype=dtype), random(3, 2, D, dtype=dtype, seed=5, scale=8)
    norm = launch.Norm(random(D, dtype=dtype, seed=3, scale=0.2), EPS, gain)
    y, normed = launch.norm_add(x, norm, residual), reference.rms_norm(x, *norm)
    # Of the norm a rounding that fell the other way, and so of the sum.
    eps = torch.finfo(dtype).eps
    allowed = eps * (2 * normed.float().abs() + (residual + normed).float().abs())
    assert ((y.float() - (residual + normed).float()).abs() <= allowed).all()
    assert (y == residual + normed).float().mean() > (0.7 if dtype == torch.float32 else 0.98)


def test_the_sum_is_of_float32():
    """4,096 ones and a half: bfloat16 sums would stop at 256."""
    x, w = torch.ones(1, 4097, dtype=torch.bfloat16), torch.ones(2, 4097, dtype=torch.bfloat16)
    assert launch.linear(x, w).tolist() == [[4096.0, 4096.0]]
    packed = PackedWeight(
        torch.ones(2, 4096, dtype=torch.int8), torch.full((2, 1), 0.5), None, 4096, 4096, WeightFormat.INT8_ROWS
    )
    assert launch.linear(x[:, :4096], packed).tolist() == [[2048.0, 2048.0]]


@pytest.mark.parametrize("act", range(4), ids=["gelu_tanh", "gelu_erf", "relu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_up_equal_the_modules(dtype, act):
    check_gate(dtype, act, "plain", 2, 96, 7)


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_gate_and_up_of_every_form(form, M):
    check_gate(torch.bfloat16, Activation.GELU_TANH, form, M, 320, 7)


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 2, 5, 8])
@pytest.mark.parametrize("I", [40, 2048, 3072])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gate_and_up_over_a_grid(form, dtype, I, M):
    check_gate(dtype, Activation.GELU_TANH, form, M, I, 17)


def check_gate(dtype, act, form, M, I, O):
    x, norm = random(M, I, dtype=dtype), launch.Norm(random(I, dtype=dtype, seed=3, scale=0.2), EPS)
    gate, up = weight(form, O, I, dtype, 0), weight(form, O, I, dtype, 1)
    y = launch.gate_up(x, norm, launch.operand(gate), launch.operand(up), (None, None), act)
    h = reference.rms_norm(x, norm.weight, EPS)
    expected = reference.gate_up(h, gate, up, act)
    # Two factors, each off by what a projection may be off by, once more for the activation and the product. The
    # factors are below 8 here, and no activation is steeper than 1.13.
    exact = [w.float() if form == "plain" else dequantize(w) for w in (gate, up)]
    eps = torch.finfo(dtype).eps
    factor = [h.float() @ w.T for w in exact]
    slack = sum(2**-22 * (h.float().abs() @ w.abs().T) for w in exact)
    if dtype != torch.float32:
        slack += eps * h.float().abs().amax(-1, keepdim=True) * max(w.abs().max() for w in exact)
    allowed = 3 * eps * expected.float().abs() + 8 * slack + 2 * eps * (factor[0] * factor[1]).abs() + 1e-7
    assert ((y.float() - expected.float()).abs() <= allowed).all()


@pytest.mark.parametrize("value", [-80.0, -10.0, -0.5, 0.0, 3e-5, 7.0, 90.0])
def test_gelu_of_extreme_gates_is_finite_and_right(value):
    """The gate alone decides: up is 1. tanh by an exponential must not overflow."""
    x, norm = torch.ones(1, 32), launch.Norm(torch.zeros(32), 0.0)
    gate, up = torch.full((1, 32), value / 32), torch.full((1, 32), 1 / 32)
    y = launch.gate_up(x, norm, launch.operand(gate), launch.operand(up), (None, None), Activation.GELU_TANH)
    expected = F.gelu(torch.tensor(value, dtype=torch.float64), approximate="tanh")
    assert abs(float(y) - float(expected)) <= 2e-6 * max(abs(float(expected)), 1e-2)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "plain"])
@pytest.mark.parametrize("M", [1, 9, 33])
def test_packed_linear_is_right_on_both_sides_of_the_crossover(form, M):
    """9 rows take two blocks of rows; 33 take the weight written out, which is rounded to the dtype first."""
    assert tuning.HOPPER.dequantize_above == 32
    x, w, b = random(M, 96, dtype=torch.bfloat16), weight(form, 10, 96, torch.bfloat16), torch.ones(10).bfloat16()
    y = launch.linear(x.view(1, M, 96), w, b)[0]
    if M <= 32:
        assert_rounded_alike(y, reference.linear(x, w, b), x, w)
    else:
        assert torch.equal(y, F.linear(x, dequantize(w, torch.bfloat16), b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [f for f in FORMS if f != "plain"])
@pytest.mark.parametrize("I", [96, 300, 1056])
def test_expanded_weights_are_bit_equal(I, form, dtype):
    w = weight(form, 9, I, dtype)
    assert torch.equal(launch.expand(w, dtype), dequantize(w, dtype))


def test_every_code_of_four_bits_is_exact_in_every_place():
    """One input at a time: 32 places of a block times 16 codes, zero 0 and 15."""
    codes = torch.arange(16)[:, None].expand(16, 32)
    for zero in (0, 15):
        w = PackedWeight(
            pack(codes),
            torch.ones(16, 1).half(),
            torch.full((16, 1), zero, dtype=torch.uint8),
            32,
            32,
            WeightFormat.INT4,
        )
        y = launch.linear(torch.eye(32), w)
        assert torch.equal(y, (torch.arange(16) - zero).float().expand(32, 16))


def test_empty_rows_and_unknown_formats():
    assert launch.linear(torch.zeros(0, 32), torch.zeros(5, 32)).shape == (0, 5)
    w = weight("int4 g32", 4, 64, torch.float32)
    with pytest.raises(InputError, match="without zeros"):
        launch.operand(w._replace(zero=None))
