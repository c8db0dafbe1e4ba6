"""dequantize(): plain weights that say what the codes said."""

import pytest
import torch

import gemmakit
from gemmakit.errors import InputError

TINY = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=32)  # fmt: skip
CONFIGS = {
    "int8": "int8",
    "int6": "int6",
    "int4": "int4",
    "bitsandbytes 8": gemmakit.BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4": gemmakit.BitsAndBytesConfig(load_in_4bit=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_weights_are_what_the_codes_stand_for(kind, tmp_path):
    if "bitsandbytes" in kind:
        pytest.importorskip("bitsandbytes")
    gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**TINY, initializer_range=0.2)).save_pretrained(tmp_path)
    config = CONFIGS[kind]
    model = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    ids = torch.tensor([[2, 5, 6, 7, 30]])
    with torch.no_grad():
        expected = model(ids).logits
        plain = model.dequantize()
        assert plain is model and not model.is_quantized
        assert all(p.is_floating_point() for p in model.parameters())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        # Kernels of codes round what goes into a layer, those of some processors more than others: to 8 bits at most.
        apart = (model(ids).logits - expected).abs().max() / expected.abs().max()
    assert float(apart) < 0.05
    model.save_pretrained(tmp_path / "plain")
    again = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "plain")
    assert not again.is_quantized and torch.equal(again(ids).logits, model(ids).logits)


def test_a_plain_model_has_nothing_to_dequantize():
    with pytest.raises(InputError, match="not quantized"):
        gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**TINY)).dequantize()
