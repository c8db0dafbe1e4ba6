"""Rounding a weight to 8 or 4 bits: how far codes may be off, and what cannot be rounded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmakit.errors import CheckpointError
from gemmakit.pytorch.kernels.packed import code_range, dequantize, unpack
from gemmakit.pytorch.quantize import rounding

LAYOUTS = [(8, None), (8, 32), (8, 128), (6, 32), (6, 128), (5, 32), (4, 32), (4, 128)]
# Of float32 products and sums beside a step of the codes.
SLACK = 1e-5


@st.composite
def weights(draw):
    O, I = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 31, 32, 33, 100, 128, 130, 257]))
    scale, shift = draw(st.sampled_from([1e-4, 0.03, 1.0, 300.0])), draw(st.sampled_from([0.0, 0.5, -3.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = (torch.randn(O, I, generator=generator) + shift) * scale
    if draw(st.booleans()):
        weight[draw(st.integers(0, O - 1))] = draw(st.sampled_from([0.0, 0.25, -7.0]))  # a constant row
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


def steps(packed):
    """The scale of each weight, (O, I)."""
    return packed.scale.float().abs().repeat_interleave(packed.group_size, 1)[:, : packed.in_features]


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from(LAYOUTS))
def test_codes_are_the_nearest_within_their_range(weight, layout):
    packed = rounding.quantize(weight, *layout)
    off = (dequantize(packed) - weight.float()).abs()
    codes = unpack(packed)
    lowest, highest = code_range(layout[0])
    ends = (codes == lowest) | (codes == highest)
    inside = off <= steps(packed) * (0.5 + SLACK)
    assert (inside | ends).all()
    if layout == (8, None):  # nothing is clipped
        assert inside.all()


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from([4, 5, 6]), st.sampled_from([32, 128]))
def test_searching_for_the_range_never_costs_accuracy(weight, bits, group_size):
    def errors(packed):
        return rounding.grouped((dequantize(packed) - weight.float()).square(), group_size).sum(2)

    searched, groups = rounding.quantize(weight, bits, group_size), rounding.grouped(weight.float(), group_size)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    # Without zeros the largest number becomes the lowest code, whatever its sign.
    reach, steps = (high - low, 15) if bits == 4 else (torch.where(-low > high, low, high), code_range(bits)[0])
    scale = torch.where(high == low, 1, reach / steps)
    scale = scale.abs().clamp_min(rounding.SMALLEST).copysign(scale).half()
    zero = (-low / scale.float()).round().clamp(0, 15).to(torch.uint8) if bits == 4 else None
    codes = rounding.encode(weight.float(), bits, scale, zero, group_size)
    plain = searched._replace(codes=codes, scale=scale, zero=zero)
    assert (errors(searched) <= errors(plain) * (1 + SLACK) + 1e-30).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_zeros_stay_exactly_zero(layout):
    weight = torch.randn(4, 70)
    weight[1], weight[:, 33] = 0, 0
    back = dequantize(rounding.quantize(weight, *layout))
    assert (back[1] == 0).all() and (back[:, 33] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pieces_and_two_passes_give_the_same_bits(layout, monkeypatch):
    weight = torch.randn(37, 100).bfloat16()
    whole = rounding.quantize(weight, *layout)
    monkeypatch.setattr(rounding, "CHUNK", 300)  # three rows at a time
    small = rounding.quantize(weight, *layout)
    scale, zero = rounding.tables_of(weight, *layout, "w")
    codes = rounding.codes_of(weight, *layout, scale, zero)
    for other in (small, small._replace(codes=codes, scale=scale, zero=zero)):
        for a, b in zip(whole[:3], other[:3], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_name_and_row(layout, bad, monkeypatch):
    monkeypatch.setattr(rounding, "CHUNK", 200)
    weight = torch.randn(7, 70)
    weight[5, 69] = bad
    with pytest.raises(CheckpointError, match=r"some\.weight has NaN, infinity.* row 5"):
        rounding.quantize(weight, *layout, name="some.weight")


def test_what_float16_scales_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="too large for a float16 scale"):
        rounding.quantize(torch.full((1, 32), 2e6), 4, 32)


def test_importance_moves_the_error_to_where_it_counts_less():
    torch.manual_seed(0)
    weight, importance = torch.randn(64, 128), torch.ones(128)
    importance[::2] = 100.0
    plain, weighed = (rounding.quantize(weight, 4, 128, importance=i) for i in (None, importance))
    errors = [((dequantize(p) - weight).square() * importance).sum() for p in (plain, weighed)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_threads_change_neither_bits_nor_torchs_own_setting(layout, monkeypatch):
    monkeypatch.setattr(rounding, "CHUNK", 500)
    weight, before = torch.randn(64, 100, requires_grad=True), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(rounding.quantize(weight, *layout))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[0][:3], found[1][:3], strict=True))
