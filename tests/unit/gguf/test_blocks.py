"""ggml's blocks to numbers and back, bit for bit as gguf-py, the reference that llama.cpp publishes, has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmakit.checkpoint.gguf.blocks import DECODERS, ENCODERS, dequantize, quantize
from gemmakit.gguf import KINDS
from gemmakit.pytorch.kernels import packed

quants = pytest.importorskip("gguf.quants", reason="pip install gguf would run it")
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: E402

SEEDS = st.integers(0, 2**32 - 1)


def test_the_table_of_types_is_ggml_s():
    sizes = {kind.name: (int(kind), *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    ours = {name: (kind.number, kind.block, kind.nbytes) for name, kind in KINDS.items()}
    assert {name: sizes[name] for name in ours} == ours
    assert len(ours) >= 33


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, blocks=st.integers(1, 70))
def test_any_bytes_mean_the_same_numbers(kind, seed, blocks):
    """Any bits at all, infinite and NaN scales among them."""
    raw = np.random.default_rng(seed).integers(0, 256, (blocks, KINDS[kind].nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        ours, theirs = dequantize(kind, raw), quants.dequantize(raw, GGMLQuantizationType[kind])
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.reshape(ours.shape).view(np.uint32))


@pytest.mark.parametrize("kind", ENCODERS)
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, blocks=st.integers(1, 40), exponent=st.integers(-30, 18), steps=st.sampled_from([0, 2, 8, 127, 254]))
def test_numbers_become_the_same_bytes(kind, seed, blocks, exponent, steps):
    """Also numbers on a grid of `steps`, which land on halves, where rounding shows; and all zeros."""
    draw = np.random.default_rng(seed)
    numbers = draw.uniform(-1, 1, (blocks, 32)).astype(np.float32)
    if steps:
        numbers = np.round(numbers * steps) / np.float32(steps)
    numbers *= np.float32(2.0**exponent)
    numbers[0] *= draw.integers(0, 2)
    np.testing.assert_array_equal(quantize(kind, numbers), quants.quantize(numbers, GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", ENCODERS)
def test_steps_too_small_for_a_half_are_zero_and_never_nan(kind):
    numbers = np.full((1, 32), 1e-44, np.float32)
    assert (dequantize(kind, quantize(kind, numbers)) == 0).all()


def test_q4_0_is_our_own_int4_in_groups_of_32():
    """The same bytes: what is read from a GGUF needs no repacking."""
    raw = np.random.default_rng(0).integers(0, 256, (12, 18), dtype=np.uint8)
    raw[:, 1] &= 0x3F  # finite scales
    ours = packed.PackedWeight(
        torch.from_numpy(raw[:, 2:].copy()).view(4, 48),
        torch.from_numpy(raw[:, :2].copy()).view(torch.float16).view(4, 3),
        torch.full((4, 3), 8, dtype=torch.uint8),
        96,
        32,
        packed.WeightFormat.INT4,
    )
    np.testing.assert_array_equal(packed.dequantize(ours).numpy().reshape(12, 32), dequantize("Q4_0", raw))
