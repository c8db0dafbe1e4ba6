"""A tiny random folder as sentence-transformers writes EmbeddingGemma's: mean, two dense layers, length 1."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemmakit import Gemma3TextConfig, Gemma3TextModel, GemmaTokenizerFast, demo_model

TEXTS = [
    "def add(self, other):", "x", "Zoë went to München\nyesterday — twice", "a longer text, " * 12,
    "over the limit of forty-eight tokens: " * 20, "",
]  # fmt: skip
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: ", "plain": ""}
WINDOW, LIMIT = 16, 48  # a window of 16 is a radius of 8: most texts are several long
STEPS = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]


def write(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def make(folder: Path, *, include_prompt: bool = True, default: str | None = None, steps: int = 5) -> Path:
    tokenizer = GemmaTokenizerFast.from_pretrained(demo_model(), add_eos_token=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    model = Gemma3TextModel(
        Gemma3TextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.4,
            sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=16, use_bidirectional_attention=True,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    paths = ["", *[f"{i}_{step}" for i, step in enumerate(STEPS) if i]]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{step}"}
        for i, (path, step) in enumerate(zip(paths, STEPS, strict=True))
    ]
    write(folder / "modules.json", entries[:steps])
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    write(folder / paths[1] / "config.json", {**pooling, "include_prompt": include_prompt})
    for path, wide, out, act in ((paths[2], 32, 96, "activation.Tanh"), (paths[3], 96, 24, "linear.Identity")):
        layer = {"in_features": wide, "out_features": out, "bias": False}
        write(folder / path / "config.json", {**layer, "activation_function": f"torch.nn.modules.{act}"})
        save_file({"linear.weight": torch.randn(out, wide) / wide**0.5}, folder / path / "model.safetensors")
    write(folder / "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": default})
    write(folder / "sentence_bert_config.json", {"max_seq_length": LIMIT, "do_lower_case": False})
    return folder
