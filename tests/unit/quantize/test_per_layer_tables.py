"""The table of layers' own embeddings: in 8 bits beside int4 layers, and left in the file it is read from."""

import sys

import pytest
import torch

import gemmakit
from gemmakit.bench.measure import random_model
from gemmakit.quantization import parse_quantization

SIZES = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=1, head_dim=16, global_head_dim=32, num_kv_shared_layers=2, use_double_wide_mlp=True,
             layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8,
             hidden_size_per_layer_input=32, vocab_size_per_layer_input=128)  # fmt: skip
IDS = torch.tensor([[2, 5, 9, 7, 3, 8]])


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_the_table_stays_in_the_file_and_the_plan_says_so(tmp_path, scheme):
    quantization = None if scheme is None else parse_quantization(scheme)
    config = gemmakit.Gemma4TextConfig(**SIZES)
    model = random_model(config, torch.bfloat16, torch.device("cpu"), quantization)
    table = model.model.embed_tokens_per_layer
    assert table.weight.dtype == (torch.bfloat16 if scheme is None else torch.int8)
    assert model.decode_plan()["embed_tokens_per_layer"].endswith("from memory")
    model.save_pretrained(tmp_path)
    loaded = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    if sys.platform == "linux":
        assert "mapped file, which is not brought" in loaded.decode_plan()["embed_tokens_per_layer"]


def test_calibration_on_a_text_is_refused_by_name(tmp_path):
    random_model(gemmakit.Gemma4TextConfig(**SIZES), torch.bfloat16, torch.device("cpu")).save_pretrained(
        tmp_path / "in"
    )
    with pytest.raises(gemmakit.errors.InputError, match="Gemma 4 is not calibrated on a text here"):
        gemmakit.quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int4", calibration_ids=IDS)
