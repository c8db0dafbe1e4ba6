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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_calibrated_model_is_nearer_to_the_plain_one(tmp_path, dtype):
    """Layers that read others' keys meet those that quantized layers make, and the embeddings that are their own."""
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.2}
    torch.manual_seed(0)
    exact = gemmakit.Gemma4ForCausalLM(gemmakit.Gemma4TextConfig(**sizes)).to(dtype)
    for layer in exact.model.layers:
        layer.layer_scalar.fill_(0.75)
    exact.save_pretrained(tmp_path / "in")
    ids = torch.randint(3, sizes["vocab_size"], (24, 32), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, told in {"rounded": {}, "calibrated": {"calibration_ids": ids[:16]}}.items():
        how = {"bits": 4, "head_bits": 8}
        gemmakit.quantize_checkpoint(tmp_path / "in", tmp_path / name, how, **told)
        model = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        a, b = (m(ids[16:]).logits.float().log_softmax(-1) for m in (exact, model))
        found[name] = float((a.exp() * (a - b)).sum(-1).mean())
        assert model.model.layers[0].layer_scalar.dtype == dtype
        assert all(type(m) is not gemmakit.pytorch.layers.Linear for m in model.model.modules())
    assert found["calibrated"] < found["rounded"]
