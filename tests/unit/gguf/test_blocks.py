"""ggml's blocks in a file: read whole in chunks of any size, and Q4_0 and Q5_0 as gemmakit's own int4 and int5."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from gguf_models import CONFIG, vocabulary

from gemmakit import GemmaConfig
from gemmakit.checkpoint.formats import gguf, gguf_blocks
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.checkpoint.layout import tensor_shapes
from gemmakit.gguf import TYPES
from gemmakit.pytorch.kernels import packed


def test_the_table_of_types_is_ggml_s():
    sizes = {kind.name: (int(kind), *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    ours = {name: (kind.number, kind.block, kind.nbytes) for name, kind in TYPES.items()}
    assert {name: sizes[name] for name in ours} == ours
    assert len(ours) >= 33


@pytest.mark.parametrize("kind", gguf.DECODED)
@pytest.mark.parametrize("chunk", [256, 1536, 1 << 20])
def test_any_bytes_mean_the_numbers_of_llama_cpp_s_reference(kind, chunk, tmp_path, monkeypatch):
    """Any bits at all, infinite and NaN scales among them; whatever the size of the chunks that they are read in."""
    number = GGMLQuantizationType[kind]
    width = 3 * 256 // TYPES[kind].block * TYPES[kind].nbytes
    raw = np.random.default_rng(int(number)).integers(0, 256, (5, width), np.uint8)
    writer = GGUFWriter(tmp_path / "x.gguf", "gemma")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_blocks, "CHUNK_ELEMENTS", chunk)
    file = gguf.GgufFile(tmp_path / "x.gguf")
    with np.errstate(all="ignore"):
        expected = quants.dequantize(raw, number)
        for framework in ("np", "pt"):
            found = np.asarray(file.tensor("model.layers.0.mlp.up_proj.weight", framework, "cpu"))
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_steps_too_small_for_a_half_are_zero_and_never_nan(kind, tmp_path):
    config = GemmaConfig(**{**CONFIG, "vocab_size": 2048, "num_hidden_layers": 1})
    tiny = np.float32([1e-44, 0, -1e-40, 1e-12])
    tensors = {name: np.resize(tiny, shape) for name, shape in tensor_shapes(config).items()}
    file = gguf.GgufFile(write_gguf(tmp_path / "x.gguf", config, tensors, vocabulary(), kind))
    assert all((file.tensor(name, "np", "cpu") == 0).all() for name in tensors if not gguf.is_norm(name))


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
    expected = quants.dequantize(raw, GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(packed.dequantize(ours).numpy().reshape(12, 32), expected)


@pytest.mark.parametrize("width", [32, 96, 128, 160, 640])
def test_q5_0_is_our_own_int5_in_groups_of_32(width):
    """The same codes in another order, whole rows of four blocks or not; and back they are the same bytes."""
    raw = np.random.default_rng(width).integers(0, 256, (7, width // 32, 22), dtype=np.uint8)
    raw[..., 1] &= 0x3F  # finite scales
    codes, steps = gguf_blocks.five_bit_codes(raw), raw[..., :2].copy().view(np.float16)[..., 0]
    five = packed.WeightFormat.INT5
    ours = packed.PackedWeight(torch.from_numpy(codes), torch.from_numpy(steps), None, width, 32, five)
    expected = quants.dequantize(raw.reshape(-1, 22), GGMLQuantizationType.Q5_0)
    np.testing.assert_array_equal(packed.dequantize(ours).numpy(), expected.reshape(7, width))
    assert torch.equal(packed.pack(packed.unpack(ours), 5), ours.codes)  # as gemmakit packs them, filled up alike
    np.testing.assert_array_equal(gguf_blocks.five_bit_blocks(codes, steps), raw)
