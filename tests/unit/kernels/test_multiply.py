"""Products of many rows in bytes: within their stated error of float64, by every instruction set that has them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import FORMATS, runnable, shifted, using
from packed_weights import SCHEMES, exact, random_packed, room

from gemmakit.native.ids import WeightFormat
from gemmakit.pytorch.kernels import cpu, linear, linear_packed
from gemmakit.pytorch.kernels.linear import takes_any_rows, takes_many
from gemmakit.pytorch.kernels.packed import PackedWeight, dequantize

MOST, UNROUNDED = 127, 2.0**40  # whole numbers to which x is rounded


def multiplied_by():
    """(instruction set, scheme) of all products that there are."""
    found = []
    for isa in runnable():
        with using(isa, 1):
            weights = {scheme: random_packed(scheme, 3, 64) for scheme in SCHEMES}
            found += [(isa, s) for s, packed in weights.items() if cpu.multiplies_bytes(packed, torch.float32)]
    return found


PAIRS = multiplied_by()
native = pytest.mark.skipif(not PAIRS, reason=f"needs the compiled kernels: {cpu.decision().why}")
everywhere = pytest.mark.parametrize(("isa", "scheme"), PAIRS)


def product(x, packed, bias=None):
    assert len(x) > cpu.MAX_ROWS  # as fewer are not multiplied in bytes
    return cpu.project(x, [cpu.matrix(packed, bias)])[0]


def rounded(x):
    """x as the kernel sees it: 8 bits in blocks of 32."""
    M, I = x.shape
    blocks = F.pad(x.float(), (0, -I % 32)).view(M, -1, 32)
    top = blocks.abs().amax(-1, keepdim=True)
    whole = (blocks * torch.where(top > 1e-30, torch.full_like(top, MOST) / top, 0.0)).round()
    return (whole.double() * (top / MOST).double()).view(M, -1)[:, :I]


@native
@everywhere
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_kernel_keeps_its_stated_error(isa, scheme, dtype):
    # Ends of vectors of tokens, of tiles of tokens, of pieces of outputs and of inputs, and more than one of each.
    for M, O, I in [(9, 1, 1), (10, 5, 31), (16, 7, 32), (17, 49, 257), (49, 97, 64), (50, 13, 2051), (33, 200, 544)]:
        packed = random_packed(scheme, O, I)
        packed = packed._replace(codes=shifted(packed.codes))
        x = shifted((torch.randn(M, I) / 16).to(dtype))  # whose sums float16 holds
        expected, allowed = exact(x, packed), room(x, packed, dtype, MOST)
        for threads in (1, 2):
            with using(isa, threads):
                got = product(x, packed).double()
            assert ((got - expected).abs() <= allowed).all(), (M, O, I, threads)


@native
@everywhere
def test_nothing_but_x_is_rounded(isa, scheme):
    """Against x rounded by hand only float32's sums are left: far less than what rounding x costs."""
    packed, x = random_packed(scheme, 60, 1100), torch.randn(40, 1100)
    with using(isa, 2):
        got = product(x, packed).double()
    # MOST / top may differ by its last place, which moves a number at a half by one step: hence a norm.
    expected = exact(rounded(x), packed)
    assert (got - expected).norm() <= 1e-3 * (exact(x, packed) - expected).norm() + 1e-5 * expected.norm()


@native
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PAIRS or [None]),
    st.integers(1, 120),
    st.integers(1, 700),
    st.integers(9, 70),
    st.integers(-25, 30),
    st.booleans(),
)
def test_shapes_and_sizes_of_x_of_all_sorts(pair, O, I, M, size, outlier):
    isa, scheme = pair
    packed = random_packed(scheme, O, I, seed=O * I)
    x = torch.randn(M, I, generator=torch.Generator().manual_seed(size)) * 10.0**size
    if outlier:
        x[0, I // 2] *= 1e4
    with using(isa, 1):
        got = product(x, packed).double()
    assert ((got - exact(x, packed)).abs() <= room(x, packed, torch.float32, MOST)).all()


@native
@everywhere
def test_a_row_depends_on_nothing_but_itself(isa, scheme):
    """Not on the rows beside it, their number, or the threads: over 1,024 rows are done in several rounds."""
    packed, x = random_packed(scheme, 50, 96), torch.randn(1100, 96).bfloat16()
    with using(isa, 1):
        whole = product(x, packed)
        parts = [product(x[i : i + n], packed) for i, n in ((0, 9), (9, 40), (49, 492))]
    assert torch.equal(torch.cat(parts), whole[:541])
    with using(isa, 2):
        assert torch.equal(product(x, packed), whole)


@native
@everywhere
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not(isa, scheme, bad):
    packed, x = random_packed(scheme, 60, 300), torch.randn(20, 300)
    x[3, 290] = bad
    kept = [i for i in range(20) if i != 3]
    with using(isa, 2):
        got, alone = product(x, packed), product(x[kept], packed)
    assert got[3].isnan().all()
    assert torch.equal(got[kept], alone)


@native
@everywhere
def test_zeros_give_zero_and_the_bias_is_added_in_float32(isa, scheme):
    packed, bias = random_packed(scheme, 53, 257), torch.randn(53).bfloat16()
    with using(isa, 1):
        got = product(torch.zeros(12, 257).bfloat16(), packed, bias)
    assert torch.equal(got, bias.expand(12, -1))


def test_codes_of_8_bits_are_not_multiplied_in_bytes_where_their_sums_could_overflow():
    for isa in {"avx512", "avx2", "neon"} & set(runnable()):
        with using(isa, 1):
            packed, x = random_packed("int8", 20, 300), torch.randn(40, 300)
            assert cpu.multiplies_bytes(random_packed("int4-32", 20, 300), x.dtype)
            assert not cpu.multiplies_bytes(packed, x.dtype) and not takes_many(packed, x.dtype)
            with torch.no_grad():
                got = linear_packed(x, packed).double()
            assert ((got - exact(x, packed)).abs() <= room(x, packed, torch.float32, UNROUNDED)).all()


@native
@pytest.mark.parametrize("scheme", ["int8", "int4-32"])
def test_with_gradients_activations_are_not_rounded_to_bytes(scheme):
    packed, x = random_packed(scheme, 64, 320), torch.randn(40, 320)
    with torch.no_grad():
        inside = linear_packed(x, packed)
    if takes_many(packed, x.dtype):
        assert torch.equal(inside, product(x, packed))
    got = linear_packed(x, packed).double()
    assert ((got - exact(x, packed)).abs() <= room(x, packed, torch.float32, UNROUNDED)).all()


@native
def test_with_16_activation_bits_many_rows_are_not_rounded():
    packed, x = random_packed("int4-32", 64, 320), torch.randn(40, 320)
    with torch.no_grad():
        exact_inputs = linear_packed(x, packed._replace(activation_bits=16))
        assert ((exact_inputs.double() - exact(x, packed)).abs() <= room(x, packed, torch.float32, UNROUNDED)).all()
        assert torch.equal(exact_inputs, linear_packed(x, packed)) != takes_many(packed, x.dtype)
    assert not takes_many(packed._replace(activation_bits=16), x.dtype)


@native
def test_a_group_that_is_the_row_needs_no_multiple_of_32():
    isa, _ = PAIRS[0]
    codes = torch.randint(-128, 128, (70, 45), dtype=torch.int8)
    packed = PackedWeight(codes, torch.ones(70, 1).half(), None, 45, 45, WeightFormat.INT8_GROUPS)
    x = torch.randn(12, 45)
    with using(isa, 1):
        if cpu.multiplies_bytes(packed, x.dtype):
            got = product(x, packed).double()
            assert ((got - exact(x, packed)).abs() <= room(x, packed, torch.float32, MOST)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("isa", runnable())
def test_unrounded_rows_meet_codes_as_they_meet_the_same_weight_in_float32(isa, scheme):
    """To the bit, for any number of rows: ends of tiles, of panels and within groups, of vectors and of blocks."""
    shapes = [(1, 1, 1), (3, 5, 31), (9, 7, 32), (17, 49, 257), (40, 97, 64), (100, 13, 2051), (193, 66, 544)]
    for M, O, I in [*shapes, (21, 70, 3100), (300, 5, 2100), (1030, 2, 33)]:
        packed = random_packed(scheme, O, I)
        packed, dense = packed._replace(codes=shifted(packed.codes)), dequantize(packed).contiguous()
        x, bias = shifted(torch.randn(M, I).bfloat16()), torch.randn(O).bfloat16()
        wide_bias = bias.float()
        for threads in (1, 2):
            with using(isa, threads):
                (got,) = cpu.project(x, [cpu.matrix(packed, bias, 32)])
                (alone,) = cpu.project(x[-1:].contiguous(), [cpu.matrix(packed, bias, 32)])
                (wide,) = cpu.project(x.float(), [cpu.matrix(dense, wide_bias)])
            assert torch.equal(got, wide.bfloat16()), (M, O, I, threads)
            assert torch.equal(got[-1:], alone), (M, O, I, threads)


@pytest.mark.parametrize("isa", runnable())
def test_what_takes_any_number_of_rows_gives_each_the_same_bits(isa):
    """bfloat16 where the processor has no products in 16 bits: one row, a decoding step's, a prompt's."""
    weight, x = torch.randn(500, 2304).bfloat16(), torch.randn(200, 2304).bfloat16()
    with using(isa, 2), torch.no_grad():
        if not takes_any_rows(weight, torch.bfloat16):
            pytest.skip(f"{isa} leaves many rows to torch's products of 16 bits")
        whole = linear(x, weight)
        parts = [linear(piece, weight) for piece in x.split([1, 7, 9, 16, 17, 150])]
    assert torch.equal(torch.cat(parts), whole)
