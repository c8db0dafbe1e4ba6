"""Layers that read the keys of others, and embeddings that layers have of their own: what calls do to them."""

import pytest
import torch
from tiny_gemma import VOCAB, away_from_zero, far, left_padded, prompts

import gemmakit
from gemmakit.errors import InputError, TokenOutOfRange
from gemmakit.pytorch.cache import DynamicCache, StaticCache
from gemmakit.pytorch.cache.window import WindowCache
from gemmakit.quantization import WeightOnlyConfig

READERS = (2, 3)  # of four layers


def small(**changes):
    config = gemmakit.Gemma4TextConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, global_head_dim=20, sliding_window=8, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCAB, max_position_embeddings=512, **changes,
    )  # fmt: skip
    return away_from_zero(gemmakit.Gemma4ForCausalLM(config)).eval()


@pytest.fixture
def seen():
    """The widths of what the MLPs of the last layers were given."""
    model, widths = small(), []
    for i in READERS:
        model.model.layers[i].mlp.register_forward_pre_hook(lambda _, x: widths.append(x[0].shape[1]))
    return model, widths


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("kind", ["none", "dynamic", "window", "filled"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_layers_that_read_others_keys_are_run_for_the_positions_asked_for(seen, last, kind, padded):
    model, widths = seen
    ids, mask = (left_padded([*prompts(1, 30), *prompts(1, 21, seed=2)], 30)) if padded else (prompts(2, 30), None)
    whole = model(ids, attention_mask=mask).logits
    assert widths == [30, 30]
    widths.clear()
    cache = {"none": None, "window": WindowCache(model.config)}.get(kind, DynamicCache())
    first = 12 if kind == "filled" else 0
    if first:
        model(ids[:, :first], attention_mask=None if mask is None else mask[:, :first], past_key_values=cache)
        widths.clear()
    kept = model(ids[:, first:], attention_mask=mask, past_key_values=cache, logits_to_keep=last).logits
    alone = kind != "none"  # without a cache of the caller's, positions may begin documents anew
    assert widths == ([last, last] if alone else [30, 30])
    assert kept.shape[1] == last
    assert far(kept, whole[:, -last:]) <= 1e-5


@torch.no_grad()
def test_who_asks_for_hidden_states_or_a_static_cache_gets_all_positions(seen):
    model, widths = seen
    ids = prompts(2, 20)
    out = model(ids, past_key_values=DynamicCache(), logits_to_keep=1, output_hidden_states=True)
    assert [state.shape[1] for state in out.hidden_states] == [20] * 5
    cache = StaticCache(model.config, 2, 40, dtype=torch.float32)
    model(ids, past_key_values=cache, cache_position=torch.arange(20), logits_to_keep=1)
    assert widths == [20] * 4


@torch.no_grad()
def test_generating_runs_them_for_the_last_token_of_a_prompt(seen):
    model, widths = seen
    ids = prompts(2, 20)
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[])
    assert set(widths) == {1}
    for i in range(20, 32):
        assert torch.equal(model(tokens[:, :i]).logits[:, -1].argmax(-1), tokens[:, i])


@pytest.mark.parametrize("quantize", [None, {"bits": 8}, {"bits": 4, "head_bits": 4}])
@torch.no_grad()
def test_resizing_changes_the_table_of_the_layers_too(tmp_path, quantize):
    model = small()
    model.save_pretrained(tmp_path)
    if quantize:
        model = gemmakit.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=WeightOnlyConfig(**quantize)
        )
    before = model(prompts()).logits
    new = torch.tensor([[VOCAB + 2]])
    with pytest.raises(TokenOutOfRange):
        model(new)
    model.resize_token_embeddings(VOCAB + 5)
    assert model.config.vocab_size_per_layer_input == VOCAB + 5 == model.model.embed_tokens_per_layer.num_embeddings
    assert far(model(prompts()).logits[..., :VOCAB], before) <= 1e-6
    assert model(new).logits.isfinite().all()
    model.save_pretrained(tmp_path / "larger")
    again = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
    assert far(again(new).logits, model(new).logits) <= 1e-6
    model.resize_token_embeddings(VOCAB)
    assert far(model(prompts()).logits, before) <= 1e-6


def test_checkpointing_that_keeps_no_graph_is_refused():
    model = small().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="use_reentrant is True"):
        model(prompts(), labels=prompts())
    model.gradient_checkpointing_enable()
    model(prompts(), labels=prompts()).loss.backward()
    assert all(p.grad is not None for p in model.model.layers[0].self_attn.parameters())
