"""Files that hold a tied pair under the head's name alone, as what writes shared memory once may choose."""

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import gemmakit
from gemmakit.errors import CheckpointError

TINY = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=32)  # fmt: skip


def by_safetensors(model, folder):
    safetensors.torch.save_model(model, folder / "model.safetensors")


def by_hub(model, folder):
    huggingface_hub.save_torch_model(model, folder)


def by_name(model, folder):
    tensors = {name: t for name, t in model.state_dict().items() if name != "model.embed_tokens.weight"}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.fixture(params=[by_safetensors, by_hub, by_name])
def saved(request, tmp_path):
    model = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**TINY))
    model.config.save_pretrained(tmp_path)
    request.param(model, tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("kind", ["GemmaForCausalLM", "GemmaModel"])
def test_it_opens_as_what_it_was(saved, kind, recwarn):
    model, folder = saved
    read = getattr(gemmakit, kind).from_pretrained(folder)
    decoder = getattr(read, "model", read)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor), name
    if kind == "GemmaForCausalLM":
        assert read.lm_head.weight is read.model.embed_tokens.weight
    assert not [str(w.message) for w in recwarn if "differs" in str(w.message)]


def test_it_opens_in_flax_and_is_converted(saved, tmp_path):
    pytest.importorskip("flax")
    model, folder = saved
    read = gemmakit.FlaxGemmaForCausalLM.from_pretrained(folder)
    ids = np.array([[2, 5, 6]])
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits
    np.testing.assert_allclose(np.asarray(read(ids).logits), expected, atol=1e-4)
    gemmakit.convert_checkpoint(folder, tmp_path / "converted")
    again = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "converted")
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert transformers.GemmaForCausalLM.from_pretrained(tmp_path / "converted")


def test_an_untied_model_still_needs_both(tmp_path):
    model = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**TINY, tie_word_embeddings=False))
    model.config.save_pretrained(tmp_path)
    by_name(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks model\.embed_tokens\.weight"):
        gemmakit.GemmaForCausalLM.from_pretrained(tmp_path)
