"""captum attributes what a gemmakit model says to its embedding and to parts of the prompt."""

import torch
from captum.attr import FeatureAblation, LayerIntegratedGradients, LLMAttribution, TextTemplateInput


def test_gradients_reach_the_embedding(model, ids):
    target = int(model(ids).logits[0, -1].argmax())
    said = lambda tokens: model(tokens).logits[:, -1]  # noqa: E731
    attribution = LayerIntegratedGradients(said, model.get_input_embeddings())
    found, delta = attribution.attribute(
        ids, torch.zeros_like(ids), target=target, n_steps=64, return_convergence_delta=True
    )
    assert found.shape == (*ids.shape, model.config.hidden_size)
    assert abs(float(delta)) < 0.05 * float(found.abs().sum())  # completeness: the parts sum to the difference


def test_parts_of_a_prompt_are_left_out_in_turn(model, tokenizer):
    asked = TextTemplateInput("{} the {}", values=["Return", "word"], baselines=["Open", "file"])
    found = LLMAttribution(FeatureAblation(model), tokenizer).attribute(asked, target=" first")
    assert found.seq_attr.shape == (2,) and bool(found.seq_attr.isfinite().all()) and bool(found.seq_attr.any())
