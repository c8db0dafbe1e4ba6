"""Sizes of tiny models that reach every branch, for tests that compare two implementations."""

VOCAB = 160
# One kv head, between, and equal to heads; N * H never equals D; widths that no power of two hides.
SHAPES = {
    "mqa": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=1, head_dim=16),
    "gqa": dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=12),
    "mha": dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=4, head_dim=16),
}
COMMON = dict(vocab_size=VOCAB, intermediate_size=72, max_position_embeddings=96, initializer_range=0.2)

WINDOW = 8
_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOWED = dict(sliding_window=WINDOW, query_pre_attn_scalar=24, max_position_embeddings=256)
_CAPPED = dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0, num_hidden_layers=4)
# The members of the family beside Gemma 1, by model_type: a short window, caps that bend, both kinds of layers.
MEMBERS = {
    "gemma2": dict(_WINDOWED, **_CAPPED),
    "gemma3_text": dict(
        _WINDOWED,
        num_hidden_layers=7,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    ),
    "vaultgemma": dict(_WINDOWED, **_CAPPED, layer_types=["full_attention", "sliding_attention"] * 2),
    # Every part at once that no released size has together: embeddings and keys of other layers, values that are keys.
    "gemma4_text": dict(
        sliding_window=WINDOW,
        max_position_embeddings=256,
        num_hidden_layers=7,
        layer_types=[_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL, _SLIDING, _FULL],
        global_head_dim=20,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=VOCAB,
        final_logit_softcapping=3.0,
    ),
}
