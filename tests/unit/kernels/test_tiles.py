"""Products by tiles of bfloat16 (AMX): within their stated error of float64, each row for itself."""

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import runnable, shifted, using
from packed_weights import SCHEMES, exact, random_packed

from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.kernels.linear import linear_plan
from gemmakit.pytorch.kernels.packed import PackedWeight, dequantize

PLAIN = "bf16"
# Ends of tiles of tokens, of weight rows and of inputs, of panels, and more than one of each.
SHAPES = [(9, 1, 1), (16, 16, 32), (17, 49, 257), (33, 13, 2051), (40, 300, 96), (65, 129, 1056), (530, 33, 64)]
tiles = pytest.mark.skipif("amx" not in runnable(), reason="needs AMX: scripts/every_isa.py --isa amx emulates it")
everywhere = pytest.mark.parametrize("scheme", [PLAIN, *SCHEMES])


def weight_of(scheme, O, I):
    return torch.randn(O, I).bfloat16() if scheme == PLAIN else random_packed(scheme, O, I)


def product(x, weight, *rest):
    return cpu.project(x, [cpu.matrix(weight, *rest)])[0]


def room(x, weight):
    """The largest error stated: the weight rounded to bfloat16 where its codes have scales of groups, a float32 sum of
    so many products, and half a unit of bfloat16's last place.
    """
    by_group = isinstance(weight, PackedWeight) and weight.scale.dtype != torch.float32
    dense = dequantize(weight) if isinstance(weight, PackedWeight) else weight
    sizes = F.linear(x.double().abs(), dense.double().abs())
    whole = F.linear(x.double(), dense.double()).abs()
    return sizes * ((2.0**-8 if by_group else 0) + (x.shape[1] + 2) * 2.0**-24) * 1.001 + whole * 2.0**-8 * 1.01 + 1e-30


@tiles
@everywhere
def test_the_stated_error_is_kept(scheme):
    for M, O, I in SHAPES:
        weight, x = weight_of(scheme, O, I), shifted(torch.randn(M, I).bfloat16())
        if scheme != PLAIN:
            weight = weight._replace(codes=shifted(weight.codes))
        expected = F.linear(x.double(), weight.double()) if scheme == PLAIN else exact(x, weight)
        for threads in (1, 2):
            with using("amx", threads):
                got = product(x, weight).double()
            assert ((got - expected).abs() <= room(x, weight)).all(), (M, O, I, threads)


@tiles
@everywhere
def test_a_row_is_the_same_among_any_others(scheme):
    """Of plain weights a step's of one row too; and where a call takes more tokens than are multiplied at a time."""
    weight, x = weight_of(scheme, 200, 1100), torch.randn(1100, 1100).bfloat16()
    fewest = 1 if scheme == PLAIN else cpu.MAX_ROWS + 1
    with using("amx", 2):
        whole = product(x, weight)
        sizes = [fewest, 9, 16, 17, 40, 64, 65, 1100 - 211 - fewest]
        parts = [product(piece.contiguous(), weight) for piece in x.split(sizes)]
    with using("amx", 1):
        assert torch.equal(product(x, weight), whole)
    assert torch.equal(torch.cat(parts), whole)


@tiles
@everywhere
def test_bias_and_residual_are_added_as_the_modules_do(scheme):
    M, O, I = 37, 70, 320
    weight, x = weight_of(scheme, O, I), torch.randn(M, I).bfloat16()
    bias, residual = torch.randn(O).bfloat16(), torch.randn(M, O).bfloat16()
    with using("amx", 2):
        bare = product(x, weight)
        biased = product(x, weight, bias)
        (both,) = cpu.project(x, [cpu.matrix(weight, bias)], residual)
        several = cpu.project(x, [cpu.matrix(weight), cpu.matrix(weight, bias)])
    assert torch.equal(both, biased + residual)
    assert torch.equal(several[0], bare) and torch.equal(several[1], biased)
    assert ((biased.double() - bare.double() - bias.double()).abs() <= 2.0**-7 * (bare.abs() + bias.abs() + 1e-3)).all()


@tiles
@everywhere
def test_numbers_that_are_none_stay_in_their_row_and_column(scheme):
    """A NaN of x in its row; of a weight in its output, whatever lies behind the last input."""
    O, I = 45, 75  # ends of tiles both ways
    weight, x = weight_of(scheme, O, I), torch.randn(40, I).bfloat16()
    with using("amx", 1):
        clean = product(x, weight)
        ill = x.clone()
        ill[3, 74] = float("nan")
        got = product(ill, weight)
        bad = weight.clone() if scheme == PLAIN else weight._replace(scale=weight.scale.clone())
        (bad if scheme == PLAIN else bad.scale)[7] = float("nan")
        column = product(x, bad)
    assert got[3].isnan().all() and torch.equal(got[[0, 39]], clean[[0, 39]])
    kept = [o for o in range(O) if o != 7]
    assert column[:, 7].isnan().all() and torch.equal(column[:, kept], clean[:, kept])


@tiles
def test_the_plan_says_so():
    with using("amx", 1):
        for weight in (random_packed("int8", 7, 64), random_packed("int4-32", 7, 64)._replace(activation_bits=16)):
            assert str(linear_plan(weight)).endswith("beyond 8 rows of bfloat16 by tiles")
