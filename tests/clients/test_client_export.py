"""torch.export of a gemmakit model: the program computes what the model does, with and without a cache."""

import torch


def test_the_program_gives_the_models_logits_and_cache(model, ids):
    width = torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(
        model, (ids,), {"use_cache": True}, dynamic_shapes={"input_ids": {1: width}, "use_cache": None}
    )
    other = torch.randint(4, model.config.vocab_size, (1, 11))
    made, expected = program.module()(other, use_cache=True), model(other, use_cache=True)
    torch.testing.assert_close(made.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.past_key_values[1][0], expected.past_key_values[1][0], atol=1e-4, rtol=1e-4)
