"""Saving and loading across libraries: single files, shards, tied and untied heads, dtypes."""

import json

import pytest
import torch
import transformers
from parity_tools import COMMON, apart, batch, randomise
from tiny_shapes import SHAPES

import gemmakit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers_loads_our_shards_with_every_tensor_equal(dtype, tied, tmp_path):
    ours = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**COMMON, **SHAPES["gqa"], tie_word_embeddings=tied))
    randomise(ours)
    ours = ours.to(dtype).eval()
    ours.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    theirs, report = transformers.GemmaForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], tensor), name
    assert (theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()) is tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_we_load_their_shards_with_every_tensor_equal(dtype, tied, tmp_path):
    config = transformers.GemmaConfig(**COMMON, **SHAPES["mqa"], tie_word_embeddings=tied)
    theirs = transformers.GemmaForCausalLM(config)
    randomise(theirs)
    theirs = theirs.to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path)
    assert ours.dtype == dtype
    state = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], tensor), name
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("author", ["transformers", "gemmakit"])
def test_base_models_of_either_library_open_in_both(author, tmp_path):
    library = {"transformers": transformers, "gemmakit": gemmakit}[author]
    model = library.GemmaModel(library.GemmaConfig(**COMMON, **SHAPES["gqa"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    ids, _ = batch("none")
    found = []
    for kind in (gemmakit.GemmaModel, gemmakit.GemmaForCausalLM):
        ours = kind.from_pretrained(tmp_path)
        found.append(getattr(ours, "model", ours)(ids).last_hidden_state.detach())
    found.append(transformers.GemmaModel.from_pretrained(tmp_path)(ids).last_hidden_state.detach())
    for mine in found[:-1]:
        assert apart(mine, found[-1]) < 2e-5


def test_generation_settings_go_both_ways(tmp_path):
    ours = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**COMMON, **SHAPES["mqa"], eos_token_id=[1, 107]))
    ours.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=12)
    ours.save_pretrained(tmp_path / "a")
    theirs = transformers.GemmaForCausalLM.from_pretrained(tmp_path / "a")
    for name in ("do_sample", "temperature", "top_p", "max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(theirs.generation_config, name) == getattr(ours.generation_config, name), name
    theirs.save_pretrained(tmp_path / "b")
    again = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "b")
    for name in ("do_sample", "temperature", "top_p", "max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(again.generation_config, name) == getattr(ours.generation_config, name), name


def test_our_config_names_what_transformers_needs(tmp_path):
    ours = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**COMMON, **SHAPES["mqa"])).bfloat16()
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["GemmaForCausalLM"]
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is transformers.GemmaForCausalLM
