"""peft's adapters on weights that hold codes: DoRA measures the numbers they stand for; merging needs these."""

import peft
import pytest
import torch

import gemmakit

TINY = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=32, initializer_range=0.2)  # fmt: skip
IDS = torch.tensor([[2, 5, 6, 7, 30]])


def adapted(model, **given):
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **given))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**TINY)).save_pretrained(folder)
    return folder


def quantized(folder, scheme):
    return gemmakit.GemmaForCausalLM.from_pretrained(folder, quantization_config=scheme, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["int8", "int6", "int4"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_codes_is_that_on_the_numbers_they_stand_for(scheme, dora, folder):
    on_codes = adapted(quantized(folder, scheme), use_dora=dora)
    on_numbers = adapted(quantized(folder, scheme).dequantize(), use_dora=dora)
    logits = [made(IDS).logits for made in (on_codes, on_numbers)]
    # Kernels of codes round what goes into a layer, those of some processors more than others.
    assert float((logits[0] - logits[1]).abs().max() / logits[1].abs().max()) < 0.05
    on_codes(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in on_codes.named_parameters() if "lora_B" in n)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["int8", "int6", "int4"])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_onto_the_numbers_of_codes_says_the_same(scheme, dora, folder):
    made = adapted(quantized(folder, scheme).dequantize(), use_dora=dora)
    expected = made(IDS).logits
    torch.testing.assert_close(made.merge_and_unload()(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["int8", "int6", "int4"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_onto_codes_is_refused_until_they_are_numbers(scheme, dora, safe, folder):
    """peft would round what it adds to whole codes, and say nothing where it merges safely or by DoRA."""
    made = adapted(quantized(folder, scheme), use_dora=dora)
    before = [p.clone() for p in made.parameters()]
    for merge in (made.merge_and_unload, made.merge_adapter):
        with pytest.raises(gemmakit.errors.InputError, match=r"call dequantize\(\) of the model first"):
            merge(safe_merge=safe)
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))
    made.get_base_model().dequantize()
    expected = made(IDS).logits
    torch.testing.assert_close(made.merge_and_unload(safe_merge=safe)(IDS).logits, expected, atol=1e-4, rtol=1e-4)
