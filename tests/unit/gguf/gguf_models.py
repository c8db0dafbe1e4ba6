"""A small Gemma that GGUF can hold, and words for it."""

from gemmakit import GemmaTokenizer, demo_model
from gemmakit.text.gguf import vocabulary_of

CONFIG = dict(vocab_size=2112, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=32, max_position_embeddings=128, dtype="bfloat16")  # fmt: skip
_made = []


def vocabulary():
    """The demo model's, which has 2048 pieces."""
    if not _made:
        _made.append(vocabulary_of(GemmaTokenizer.from_pretrained(demo_model())))
    return _made[0]


def tensors_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head.")}
