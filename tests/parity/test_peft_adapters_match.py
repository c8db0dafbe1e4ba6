"""Adapters of peft made with transformers give here the numbers that they give there, on embedding and head too.

peft scales what it adds to the embedding by the layer's `embed_scale`, and asks `_tied_weights_keys` what is tied.
"""

import peft
import pytest
import torch
import transformers
from parity_tools import apart, batch, randomise

import gemmakit

KINDS = {
    "tokens": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[5, 6, 7]),
    "embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    "both": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "saved head": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved embedding": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapter_made_with_transformers_gives_the_same_numbers(kind, tmp_path):
    fields = dict(vocab_size=160, hidden_size=48, intermediate_size=72, num_hidden_layers=2)
    heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=12)
    theirs = transformers.GemmaForCausalLM(transformers.GemmaConfig(**fields, **heads)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(theirs, KINDS[kind]())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ("lora_", "trainable_tokens", "modules_to_save")):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    base = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "base")
    ids, _ = batch("none")
    plain = base(ids).logits
    ours = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert apart(ours(ids).logits, adapted(ids).logits) < 1e-5  # float32, sums in another order
    assert apart(ours(ids).logits, plain) > 0.01
