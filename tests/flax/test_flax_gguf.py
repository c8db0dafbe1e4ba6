"""Flax models from GGUF files: the numbers of the PyTorch model of the same file."""

import jax
import numpy as np
import pytest
import torch

import gemmakit
from gemmakit import FlaxGemmaForCausalLM, GemmaForCausalLM

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
