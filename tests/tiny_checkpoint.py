"""A checkpoint as small as can be, with Gemma's vocabulary layout and a context long enough to be interrupted in."""

from __future__ import annotations

from pathlib import Path

import demo_vocabulary
import torch

from gemmakit import GemmaConfig, GemmaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
EOS = [1, 107]
CONTEXT = 4096


def tiny_config(**changes: object) -> GemmaConfig:
    sizes: dict = dict(
        vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT, initializer_range=0.4,
    )  # fmt: skip
    return GemmaConfig(**{**sizes, **changes})


def write_vocabulary(folder: Path) -> Path:
    texts = [(ROOT / "benchmarks" / "data" / "held_out.txt").read_text(encoding="utf-8")]
    return demo_vocabulary.train(texts, folder / "tokenizer.model", vocab_size=1024)


def make(folder: Path, **changes: object) -> Path:
    """A random model that never says an end token by itself: their rows of the tied embedding are zero."""
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder)
    torch.manual_seed(0)
    model = GemmaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        model.get_input_embeddings().weight[EOS] = 0
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    return folder
