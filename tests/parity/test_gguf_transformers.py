"""transformers reads our GGUF files, as soon as it knows Gemma in them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

import gemmakit
from gemmakit.checkpoint import open_checkpoint
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.text.gguf import vocabulary_of


@pytest.mark.skipif(
    "gemma" not in GGUF_SUPPORTED_ARCHITECTURES,
    reason="a transformers whose GGUF reader knows 'gemma' would run it; 5.23 knows gemma2, gemma3 and gemma4",
)
def test_transformers_gets_the_same_logits_from_our_file(tmp_path):
    pytest.importorskip("gguf.quants", reason="pip install gguf would run it")
    source = gemmakit.demo_model()
    with open_checkpoint(source) as checkpoint:
        config = gemmakit.GemmaConfig.from_pretrained(source)
        vocabulary = vocabulary_of(gemmakit.GemmaTokenizer.from_pretrained(source))
        write_gguf(tmp_path / "x.gguf", config, dict(checkpoint.items()), vocabulary, "F32")
    ours = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    ids = torch.tensor([[2, 500, 900, 1200]])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-4)
