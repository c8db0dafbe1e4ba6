"""TransformerLens puts its hooks around the modules of a gemmakit model."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("registered")


def test_activations_are_read_and_changed(model, tokenizer, ids):
    from transformer_lens.model_bridge import TransformerBridge

    expected = model(ids).logits
    lens = TransformerBridge.boot_transformers("gemma-2b", hf_model=model, tokenizer=tokenizer)
    logits, cache = lens.run_with_cache(ids)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert cache["blocks.0.attn.hook_pattern"].shape == (1, model.config.num_attention_heads, *ids.shape, ids.shape[1])
    changed = lens.run_with_hooks(ids, fwd_hooks=[("blocks.1.mlp.hook_out", lambda value, hook: value * 0)])
    assert not torch.allclose(changed, expected, atol=1e-2)
