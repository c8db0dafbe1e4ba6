"""Flax models from GGUF files: the numbers of the PyTorch model of the same file."""

import jax
import numpy as np
import pytest
import torch
from flax_tools import MEMBERS, WINDOW, apart, as_torch, batch, make_torch
from tiny_shapes import SHAPES

import gemmakit
from gemmakit import FlaxGemmaForCausalLM, GemmaForCausalLM
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.text.gguf import vocabulary_of

IDS = [[2, 500, 900, 1200, 77]]


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")])
def test_a_flax_model_of_a_gguf_file_computes_what_pytorch_s_does(tmp_path, kind, dtype):
    gemmakit.convert_checkpoint(gemmakit.demo_model(), tmp_path / "x.gguf", type=kind)
    ours = FlaxGemmaForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert {str(leaf.dtype) for leaf in jax.tree_util.tree_leaves(ours.params)} == {dtype}
    exact = FlaxGemmaForCausalLM.from_pretrained(tmp_path / "x.gguf", param_dtype="float32")
    theirs = GemmaForCausalLM.from_pretrained(tmp_path / "x.gguf", dtype=torch.float32)
    found, expected = np.asarray(exact(np.array(IDS)).logits), theirs(torch.tensor(IDS)).logits.detach().numpy()
    assert abs(found - expected).max() < 1e-5 * abs(expected).max()


# Whose own layers, and those that share keys, are as llama.cpp's Gemma 4 has them in the small sizes.
SMALL = {
    **MEMBERS["gemma4"],
    "attention_k_eq_v": False,
    "num_global_key_value_heads": None,
    "vocab_size_per_layer_input": 2048,
}
CASES = [(name, kind) for name in ("gemma2", "gemma3") for kind in ("F32", "Q8_0")] + [("gemma4", "Q8_0")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_gguf_of_a_later_member_gives_pytorch_s_logits_past_several_windows(tmp_path, name, kind):
    member = SMALL if name == "gemma4" else {**MEMBERS[name], "query_pre_attn_scalar": SHAPES["gqa"]["head_dim"]}
    model = make_torch(**{**SHAPES["gqa"], **member, "hidden_size": 64, "vocab_size": 2048})
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    vocabulary = vocabulary_of(gemmakit.GemmaTokenizer.from_pretrained(gemmakit.demo_model()))
    path = write_gguf(tmp_path / "x.gguf", model.config, tensors, vocabulary, kind)
    ours = FlaxGemmaForCausalLM.from_pretrained(path, param_dtype="float32")
    theirs = gemmakit.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids, _ = batch("none", width=4 * WINDOW)
    assert type(ours).__name__ == f"FlaxG{name[1:]}ForCausalLM"
    with torch.no_grad():
        assert apart(ours(ids).logits, theirs(as_torch(ids)).logits) < (4e-5 if name == "gemma4" else 1e-5)
