"""torchao rounds the weights of a gemmakit model in place."""

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def test_a_model_of_8_bit_weights_says_what_it_said(model, ids):
    with torch.no_grad():
        expected, whole = model(ids).logits, model.generate(ids, max_new_tokens=6)
        quantize_(model, Int8WeightOnlyConfig())
        logits = model(ids).logits
    assert not torch.equal(logits, expected)
    assert float((logits - expected).abs().max() / expected.abs().max()) < 0.05  # half a step of 127 in each weight
    assert model.generate(ids, max_new_tokens=6).shape == whole.shape
