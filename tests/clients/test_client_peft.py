"""peft's methods on a gemmakit model: some steps, its files, and the numbers that it has on transformers' model."""

import peft
import pytest
import torch

import gemmakit

NAMES = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=NAMES, task_type="CAUSAL_LM"),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=NAMES, use_dora=True, task_type="CAUSAL_LM"),
    "AdaLoRA": lambda: peft.AdaLoraConfig(r=4, target_modules=NAMES, total_step=10, task_type="CAUSAL_LM"),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[2, 5, 6], task_type="CAUSAL_LM"),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=NAMES, task_type="CAUSAL_LM"),
    "OFT": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=NAMES, task_type="CAUSAL_LM"),
}


def trained(model, kind, ids):
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model.train(), KINDS[kind]())
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return adapted.eval(), losses


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_is_read_again_with_the_numbers_of_transformers_model(kind, model, theirs, name, ids, tmp_path):
    adapted, losses = trained(model, kind, ids)
    other, expected = trained(theirs, kind, ids)
    assert losses == pytest.approx(expected, rel=1e-3)
    if kind != "AdaLoRA":  # whose first step leaves B at zero
        assert losses[-1] != losses[0]
    adapted.save_pretrained(tmp_path)
    base = gemmakit.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        said = adapted(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(again(input_ids=ids, attention_mask=mask).logits, said)
        torch.testing.assert_close(said, other(input_ids=ids, attention_mask=mask).logits, atol=2e-3, rtol=2e-3)
    given = dict(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert adapted.generate(**given).tolist() == other.generate(**given).tolist()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "AdaLoRA", "IA3", "LoHa", "OFT"])
def test_what_is_merged_says_the_same(kind, model, ids):
    adapted, _ = trained(model, kind, ids)
    with torch.no_grad():
        said = adapted(input_ids=ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(input_ids=ids).logits, said, atol=1e-3, rtol=1e-3)


def test_layers_are_recomputed_under_an_adapter(model, ids):
    """Reentrant too, which needs gradients at the embedding's output."""
    adapted = peft.get_peft_model(model.train(), KINDS["LoRA"]())
    gradients = []
    for how in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        adapted.zero_grad()
        if how is not None:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable(how)
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in adapted.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two)


CODED = [("int8", "LoRA"), ("int8", "DoRA"), ("int8", "LoHa"), ("int8", "OFT"), ("int4", "LoRA"), ("int4", "DoRA")]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(("codes", "kind"), CODED)
def test_codes_are_not_merged_onto_and_plain_weights_are(codes, kind, safe, name, ids):
    """QLoRA and QDoRA say what the same adapter says on the numbers that the codes stand for."""
    coded = gemmakit.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, quantization_config=codes)
    adapted, losses = trained(coded, kind, ids)
    assert losses[-1] != losses[0]
    before = [p.clone() for p in adapted.parameters()]
    with torch.no_grad():
        said = adapted(input_ids=ids).logits
        with pytest.raises(gemmakit.errors.InputError, match=r"call dequantize\(\) of the model first"):
            adapted.merge_and_unload(safe_merge=safe)
        assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))
        adapted.get_base_model().dequantize()
        # Products of codes round their inputs to 8 bits too, or sum in another order.
        plain = adapted(input_ids=ids).logits
        assert float((plain - said).abs().max() / said.abs().max()) < 0.02
        merged = adapted.merge_and_unload(safe_merge=safe)(input_ids=ids).logits
    torch.testing.assert_close(merged, plain, atol=1e-3, rtol=1e-3)
