"""TransformerLens puts its hooks around the modules of a gemmakit model, and computes its attention itself."""

import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

import gemmakit

pytestmark = pytest.mark.usefixtures("registered")
TINY = dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64)  # fmt: skip
MEMBERS = {
    "google/gemma-2b": ("Gemma", {}),
    "google/gemma-2-2b": ("Gemma2", dict(sliding_window=4, query_pre_attn_scalar=8)),
    "google/gemma-3-1b-it": (
        "Gemma3",
        dict(sliding_window=4, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"] * 2),
    ),
}


def test_activations_are_read_and_changed(model, tokenizer, ids):
    expected = model(ids).logits
    lens = TransformerBridge.boot_transformers("gemma-2b", hf_model=model, tokenizer=tokenizer)
    logits, cache = lens.run_with_cache(ids)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert cache["blocks.0.attn.hook_pattern"].shape == (1, 4, ids.shape[1], ids.shape[1])
    changed = lens.run_with_hooks(ids, fwd_hooks=[("blocks.1.mlp.hook_out", lambda value, hook: value * 0)])
    assert not torch.allclose(changed, expected, atol=1e-2)


def test_it_continues_what_the_model_continues(model, tokenizer):
    ids = tokenizer("If the file", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    lens = TransformerBridge.boot_transformers("google/gemma-2b", hf_model=model, tokenizer=tokenizer)
    assert lens.generate(ids, max_new_tokens=6, do_sample=False, return_type="tokens").tolist() == expected.tolist()


@pytest.mark.parametrize("member", MEMBERS)
def test_every_hook_sees_what_it_sees_in_transformers_model(member, tokenizer, tmp_path):
    """Windows shorter than the text, capped scores and norms of heads among it."""
    kind, more = MEMBERS[member]
    config = getattr(gemmakit, {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config"))(**TINY, **more)
    torch.manual_seed(0)
    made = getattr(gemmakit, f"{kind}ForCausalLM")(config)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)
    made.save_pretrained(tmp_path)
    ids, found = torch.randint(4, 2000, (1, 11)), []
    for library in (gemmakit, transformers):
        model = library.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        found.append(
            TransformerBridge.boot_transformers(member, hf_model=model, tokenizer=tokenizer).run_with_cache(ids)
        )
    (logits, ours), (expected, theirs) = found
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    compared = [name for name in theirs if not name.startswith("rotary")]  # the tables have a place for heads here
    assert len(compared) > 100 and {*compared} <= {*ours}
    for name in compared:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
