"""All six rotary types, within and beyond the trained context, against transformers' tables.

The tolerance is 1e-4 absolute on cos and sin: both compute inverse frequencies in float32 (relative 1e-7 apart where
operations come in another order), and positions reach 200.
"""

import pytest
import torch
import transformers
from parity_tools import COMMON, apart, batch
from tiny_shapes import SHAPES
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding as TheirRotary

import gemmakit
from gemmakit.pytorch.layers import GemmaRotaryEmbedding

SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]  # of head_dim 12
ROPES = {
    "default": {"rope_type": "default"},
    "other_theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn_trained": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn_ramp": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4, "beta_slow": 0.5, "truncate": False},
    "yarn_attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn_mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 0.5},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 24,
    },
    "longrope_factor": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 3.0,
        "original_max_position_embeddings": 24,
    },
    "longrope_attention": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.3,
        "original_max_position_embeddings": 24,
    },
}  # fmt: skip
FIELDS = {**COMMON, **SHAPES["gqa"]}


def both_configs(rope):
    parameters = {"rope_theta": 10000.0, **rope}
    return (
        gemmakit.GemmaConfig(**FIELDS, rope_parameters=dict(parameters)),
        transformers.GemmaConfig(**FIELDS, rope_parameters=dict(parameters)),
    )


@pytest.mark.parametrize("length", [5, 24, 25, 96, 97, 200])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_tables_of_every_type_equal_the_oracle(rope, length):
    ours, theirs = both_configs(rope)
    positions = torch.arange(length)[None]
    mine = GemmaRotaryEmbedding(ours)(positions, torch.float32)
    other = TheirRotary(theirs)(torch.zeros(1), positions)
    for a, b in zip(mine, other, strict=True):
        assert a.shape == (1, 1, length, 12)
        assert float((a[:, 0] - b).abs().max()) < 1e-4


def test_dynamic_and_longrope_change_beyond_the_trained_length():
    """The grid above would hold trivially if both libraries ignored the length."""
    for name, limit in (("dynamic", 96), ("longrope", 24)):
        rope = GemmaRotaryEmbedding(both_configs(ROPES[name])[0])
        inside, beyond = (rope(torch.arange(n)[None], torch.float32)[0][0, 0, 3] for n in (limit, limit + 1))
        assert not torch.allclose(inside, beyond, atol=1e-3)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_long_call_leaves_no_trace_in_a_later_short_one(name):
    rope = GemmaRotaryEmbedding(both_configs(ROPES[name])[0])
    before = rope(torch.arange(10)[None], torch.float32)
    rope(torch.arange(200)[None], torch.float32)
    assert torch.equal(rope(torch.arange(10)[None], torch.float32)[0], before[0])


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_checkpoints_with_any_rope_give_equal_logits(pair, rope):
    parameters = {"rope_theta": 10000.0, **rope}
    for author in ("transformers", "gemmakit"):
        both = pair("gqa", author, rope_parameters=parameters)
        ids, _ = batch("none", width=40)
        with torch.no_grad():
            assert apart(both.ours(ids).logits, both.theirs(ids).logits) < 2e-5
