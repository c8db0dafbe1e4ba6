"""torchao rounds the weights of a gemmakit model in place."""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import gemmakit
from gemmakit.errors import InputError


def test_a_model_of_8_bit_weights_says_what_it_said(model, ids):
    with torch.no_grad():
        expected, whole = model(ids).logits, model.generate(ids, max_new_tokens=6)
        quantize_(model, Int8WeightOnlyConfig())
        logits = model(ids).logits
    assert not torch.equal(logits, expected)
    assert float((logits - expected).abs().max() / expected.abs().max()) < 0.05  # half a step of 127 in each weight
    assert model.generate(ids, max_new_tokens=6).shape == whole.shape


def test_a_saved_model_has_the_numbers_that_its_8_bit_weights_stand_for(model, ids, tmp_path):
    def all_but_the_head(module, name):
        return isinstance(module, torch.nn.Linear) and name != "lm_head"

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=all_but_the_head)
    with pytest.warns(UserWarning, match=r"weights are Int8Tensor of another library.*stored as the numbers"):
        model.save_pretrained(tmp_path)
    again = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    stored = again.state_dict()
    for name, weight in model.state_dict().items():
        stands_for = weight.dequantize() if hasattr(weight, "qdata") else weight
        assert torch.equal(stored[name], stands_for), name
    with torch.no_grad():
        expected, logits = model(ids).logits, again(ids).logits
    # Theirs scales a sum of codes, ours sums scaled codes: float32 rounded in another order.
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_head_that_was_rounded_alone_is_not_taken_for_the_embedding(model, tmp_path):
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        model.save_pretrained(tmp_path / "tied")
    model = gemmakit.AutoModelForCausalLM.from_pretrained(gemmakit.demo_model(), dtype=torch.float32)
    model.untie_weights()
    quantize_(model, Int8WeightOnlyConfig())
    model.save_pretrained(tmp_path / "apart")
    again = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path / "apart", dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.dequantize())
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
