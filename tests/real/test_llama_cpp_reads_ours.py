"""llama.cpp reads Gemma 2 and 3 as we write them: windows, pattern, rotary tables, caps; the same greedy tokens."""

from __future__ import annotations

import os

import pytest
import reference
import torch

import gemmakit
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.text.gguf import vocabulary_of

pytestmark = pytest.mark.skipif(
    "GEMMAKIT_LLAMA_PYTHON" not in os.environ,
    reason="GEMMAKIT_LLAMA_PYTHON=a Python that has llama-cpp-python would run it",
)

WINDOW = 8
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
TABLES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
MEMBERS = {
    "gemma2": dict(model_type="gemma2", num_hidden_layers=4),
    "gemma2 with caps of its own": dict(
        model_type="gemma2", num_hidden_layers=4, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": dict(model_type="gemma3_text", num_hidden_layers=7),
    "gemma3 of another pattern": dict(model_type="gemma3_text", num_hidden_layers=4, sliding_window_pattern=2),
    "gemma3 from 4B": dict(
        model_type="gemma3_text", num_hidden_layers=7, rope_parameters=TABLES, final_logit_softcapping=30.0
    ),
    "gemma3 of no pattern": dict(model_type="gemma3_text", num_hidden_layers=4, layer_types=MIXED),
    "gemma3 without windows": dict(model_type="gemma3_text", num_hidden_layers=2, layer_types=MIXED[:1] * 2),
    "gemma2 of no pattern": dict(model_type="gemma2", num_hidden_layers=4, layer_types=MIXED),
}  # fmt: skip
# Of two logits closer than this either may come out on top: llama.cpp's GELU is a table of float16.
NEAR = 0.01


def made(**member):
    values = dict(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=128, sliding_window=WINDOW, dtype="float32",
        **member,
    )  # fmt: skip
    model = gemmakit.AutoModelForCausalLM.from_config(gemmakit.GemmaConfig.from_dict(values))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize("member", MEMBERS)
def test_greedy_tokens_are_the_same_past_several_windows(member, tmp_path):
    model = made(**MEMBERS[member])
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    vocabulary = vocabulary_of(gemmakit.GemmaTokenizer.from_pretrained(gemmakit.demo_model()))
    gguf = write_gguf(tmp_path / "x.gguf", model.config, tensors, vocabulary, "F32")
    ids = torch.randint(3, 2048, (3, 5 * WINDOW), generator=torch.Generator().manual_seed(1)).tolist()
    found = reference.llama_cpp({"gguf": str(gguf), "prompts": ids, "new_tokens": 3 * WINDOW, "context": 128})
    again = gemmakit.AutoModelForCausalLM.from_pretrained(gguf)
    parted = []
    for prompt, tokens, gaps in zip(ids, found["continuations"], found["gaps"], strict=True):
        for kept in (model, again):
            with torch.no_grad():
                logits = kept(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
            parted += [gaps[i] for i, token in enumerate(logits.argmax(-1).tolist()) if token != tokens[i]]
    assert all(gap < NEAR for gap in parted), parted
    assert len(parted) <= 2
    assert len({token for tokens in found["continuations"] for token in tokens}) > 2
