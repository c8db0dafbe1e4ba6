"""nnsight reads and changes what passes between the modules of a gemmakit model."""

import torch
from nnsight import NNsight


def test_hidden_states_are_read_and_changed(model, ids):
    expected = model(ids, output_hidden_states=True)
    wrapped = NNsight(model)
    with wrapped.trace(ids):
        hidden = wrapped.model.layers[1].mlp.output.save()
        logits = wrapped.output.logits.save()
    assert hidden.shape == (*ids.shape, model.config.hidden_size)
    torch.testing.assert_close(logits, expected.logits)
    with wrapped.trace(ids):
        wrapped.model.layers[1].mlp.output[:] = 0
        changed = wrapped.output.logits.save()
    assert not torch.allclose(changed, expected.logits, atol=1e-2)


def test_its_language_model_generates(model, tokenizer, registered):
    from nnsight.modeling.transformers import TransformersModel

    wrapped = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    with wrapped.generate("If the file", max_new_tokens=4):
        tokens = wrapped.generator.output.save()
    expected = model.generate(**tokenizer("If the file", return_tensors="pt"), max_new_tokens=4)
    assert tokens.tolist() == expected.tolist()
