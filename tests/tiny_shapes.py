"""Sizes of tiny models that reach every branch, for tests that compare two implementations."""

VOCAB = 160
# One kv head, between, and equal to heads; N * H never equals D; widths that no power of two hides.
SHAPES = {
    "mqa": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=1, head_dim=16),
    "gqa": dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=12),
    "mha": dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=4, head_dim=16),
}
COMMON = dict(vocab_size=VOCAB, intermediate_size=72, max_position_embeddings=96, initializer_range=0.2)
