"""What a token costs is what the model's own tensors hold."""

import sys
from pathlib import Path

import pytest
import torch

import gemmakit
from gemmakit.bench.measure import (
    costs,
    linear_weights,
    random_model,
    scheme_config,
    size_config,
    weights_read,
)
from gemmakit.bench.timing import Work
from gemmakit.pytorch.quantize import QuantizedWeight

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "sides"))
from gemmakit_side import training_flops


def hollow(size, **changes):
    with torch.device("meta"):
        return gemmakit.GemmaForCausalLM(size_config(size, **changes)).to(torch.bfloat16)


# Norms are the part in a thousand that the stated figures leave out.
@pytest.mark.parametrize(("size", "gb", "gflop", "kv"), [("2b", 5.01, 3.96, 18432), ("7b", 17.08, 15.5, 458752)])
def test_the_released_shapes_cost_what_is_published_of_them(size, gb, gflop, kv):
    model = hollow(size)
    assert weights_read(model)["weight_bytes"] / 1e9 == pytest.approx(gb, rel=1e-3)
    assert 2 * linear_weights(model.config) / 1e9 == pytest.approx(gflop, rel=2e-3)
    assert 2 * model.config.cache_size(1) == kv


def test_a_tied_table_counts_once_and_an_untied_embedding_not_at_all():
    tied, untied = hollow("tiny"), hollow("tiny", tie_word_embeddings=False)
    assert weights_read(tied) == weights_read(untied)
    head = tied.config.vocab_size * tied.config.hidden_size * 2
    assert (weights_read(tied)["head_bytes"], weights_read(tied)["head_dtype"]) == (head, "bfloat16")
    assert weights_read(tied)["weight_bytes"] == sum(p.nbytes for p in tied.parameters())


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-g128"])
def test_packed_weights_count_with_their_scales(scheme):
    config = size_config("tiny")
    model = random_model(config, torch.bfloat16, torch.device("cpu"), scheme_config(scheme))
    packed = {id(m.weight): m.packed for m in model.modules() if isinstance(m, QuantizedWeight)}
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    read = weights_read(model)
    assert read["weight_bytes"] == sum(p.nbytes for p in packed.values()) + norms
    assert read["head_bytes"] == model.lm_head.packed.nbytes
    assert read["head_dtype"] == "int8"


def test_linear_weights_are_those_of_the_projections():
    model = hollow("tiny")
    found = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    assert linear_weights(model.config) == found


def test_a_prompt_meets_no_weights_of_which_its_last_token_alone_is_asked():
    config = size_config("gemma4-e2b")
    layers = [2 * (3 * 1536 * 6144 + (2 * 8 + 2) * 1536 * wide + 2 * 1536 * 256) for wide in (256, 512)]
    assert 2 * linear_weights(config, prompt=True) == 12 * layers[0] + 3 * layers[1] + 2 * 1536 * 35 * 256
    behind_attention = 2048 * 2048 + 3 * 2048 * 16384
    plain = size_config("2b")
    assert linear_weights(plain, prompt=True) == linear_weights(plain) - behind_attention
    assert costs(hollow("2b"), Work())["prefill_flops_a_token"] == 2 * linear_weights(plain, prompt=True)
    experts = size_config("gemma4-26b-a4b")
    assert linear_weights(experts, prompt=True) == linear_weights(experts)


def test_training_costs_six_operations_a_weight_and_token_besides_attention():
    config = size_config("2b")
    weights = linear_weights(config) + config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 2048 / 2
    assert training_flops(config, 2048) == 2048 * (6 * weights + attention)


def test_a_window_layer_is_read_no_further_than_its_window():
    config = gemmakit.GemmaConfig.preset("gemma3-4b")
    token = 2 * 2 * 4 * 256  # bytes of a layer in bfloat16
    assert 2 * config.cache_size(131_072) == token * (5 * 131_072 + 29 * 1024)
    assert 2 * config.cache_size(1000) == token * 34 * 1000
