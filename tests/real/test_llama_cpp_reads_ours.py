"""llama.cpp reads Gemma 2, 3 and 4 as we write them: windows, pattern, rotary tables, caps; the same greedy tokens."""

from __future__ import annotations

import os

import pytest
import reference
import torch

import gemmakit
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.hub import models_folder
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
GEMMA4 = dict(
    model_type="gemma4_text", sliding_window_pattern=3, global_head_dim=64, final_logit_softcapping=30.0,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
)  # fmt: skip
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
    "gemma4 dense": dict(GEMMA4, num_hidden_layers=6, attention_k_eq_v=True, num_global_key_value_heads=1,
                         hidden_size_per_layer_input=0),
    "gemma4 of small size": dict(GEMMA4, num_hidden_layers=9, num_kv_shared_layers=3, use_double_wide_mlp=True,
                                 hidden_size_per_layer_input=32, vocab_size_per_layer_input=2048),
}  # fmt: skip
# Of two logits closer than this either may come out on top: llama.cpp's GELU is a table of float16.
NEAR = 0.01


def made(**member):
    values = dict(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=128, sliding_window=WINDOW, dtype="float32",
        **{"vocab_size": 2048, **member},
    )  # fmt: skip
    model = gemmakit.AutoModelForCausalLM.from_config(gemmakit.GemmaConfig.from_dict(values))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if name.endswith("norm.weight"):
                parameter += 1 - model.config.kind.norm_offset
        for layer in model.model.layers:
            if layer.layer_scalar is not None:
                layer.layer_scalar.fill_(0.75)
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
    assert len(parted) <= 4  # of 72 steps, each met by the model and by what the file gives again
    assert len({token for tokens in found["continuations"] for token in tokens}) > 2


TEXTS = (
    "The capital of France is", "  two  spaces\tand a tab\n\n\nlines\n", "def f(x):\n    return x ** 2  # half",
    "日本の首都は東京です。", "naïve café 🙂 \u200b𓀀", "1,234.5 <b>bold</b> <|turn>user\nHi<turn|>\n",
    "a" * 50 + "\n" * 20, "\x00\x7f\r\n", "ΑΒΓ абв עברית हिन्दी", "x" + " " * 33 + "y",
)  # fmt: skip


@pytest.mark.parametrize("name", ["demo", "gemma3-vocabulary"])
def test_merges_give_the_ids_that_scores_give(name, tmp_path):
    """Gemma 4's tokenizer of pieces and merges, made of a vocabulary that Google trained too."""
    folder = gemmakit.demo_model() if name == "demo" else models_folder() / name
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"{folder} holds no tokenizer.json: `make real` brings it (GEMMAKIT_REAL says where to)")
    tokenizer = gemmakit.GemmaTokenizerFast.from_pretrained(folder)
    model = made(**{**MEMBERS["gemma4 dense"], "num_hidden_layers": 3, "vocab_size": len(tokenizer)})
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    gguf = write_gguf(tmp_path / "x.gguf", model.config, tensors, vocabulary_of(tokenizer), "F16")
    found = reference.llama_cpp({"gguf": str(gguf), "texts": TEXTS, "prompts": [], "new_tokens": 0, "context": 128})
    again = gemmakit.GemmaTokenizerFast.from_pretrained(gguf)
    for text, theirs in zip(TEXTS, found["ids"], strict=True):
        assert theirs == tokenizer(text)["input_ids"], text
        assert again(text)["input_ids"] == theirs, text
