"""The grouped-query helper: mean-pooled key and value heads of a multi-head checkpoint."""

from __future__ import annotations

import pytest
import torch

from gemmakit import GemmaConfig, GemmaForCausalLM, GemmaModel
from gemmakit.errors import ConfigError, InputError
from gemmakit.pytorch.heads import GemmaForSequenceClassification
from gemmakit.utils.grouped_query import to_grouped_query

H = 8


def tiny(cls=GemmaForCausalLM, **more):
    torch.manual_seed(0)
    settings = dict(vocab_size=40, hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=6,
                    num_key_value_heads=6, head_dim=H, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
    model = cls(GemmaConfig(**{**settings, **more})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_each_new_head_is_the_mean_of_its_neighbours(heads, bias):
    model = tiny(attention_bias=bias)
    new = to_grouped_query(model, heads)
    group = 6 // heads
    assert new.config.num_key_value_heads == heads and model.config.num_key_value_heads == 6
    for name, p in new.named_parameters():
        old = model.get_parameter(name)
        if ".k_proj." in name or ".v_proj." in name:
            for g in range(heads):
                rows = [old[n * H : n * H + H] for n in range(g * group, (g + 1) * group)]
                torch.testing.assert_close(p[g * H : g * H + H], sum(rows) / group)
        else:
            assert torch.equal(p, old), name
    assert new.lm_head.weight is new.get_input_embeddings().weight


@pytest.mark.parametrize("cls", [GemmaModel, GemmaForCausalLM, GemmaForSequenceClassification])
@torch.no_grad()
def test_pooling_equal_heads_changes_nothing(cls, ids, tmp_path):
    model = tiny(cls)
    for layer in model.base_model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = projection.weight.view(2, 3, H, 20)
            heads[:] = heads[:, :1].clone()
    new = to_grouped_query(model, 2)
    assert type(new) is cls and not new.training
    torch.testing.assert_close(new(ids)[0], model(ids)[0], atol=1e-5, rtol=1e-4)
    new.save_pretrained(tmp_path)
    torch.testing.assert_close(cls.from_pretrained(tmp_path)(ids)[0], new(ids)[0])


@torch.no_grad()
def test_a_state_dict_gives_the_same_weights(ids):
    model = tiny()
    pooled = to_grouped_query(model.state_dict(), 3, model.config)
    for name, tensor in to_grouped_query(model, 3).state_dict().items():
        assert torch.equal(tensor, pooled[name]), name


@torch.no_grad()
def test_the_format_is_kept_and_grouped_models_can_be_pooled_again(ids):
    model = to_grouped_query(tiny().bfloat16().train(), 3)
    assert model.dtype == torch.bfloat16 and model.training
    again = to_grouped_query(model, 1)
    assert again(ids).past_key_values[0][0].shape == (2, 1, 9, H)
    assert torch.equal(again.model.rotary_emb.inv_freq, tiny().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("heads", [0, 4, 12, 2.0, True])
def test_numbers_that_make_no_even_groups_are_refused(heads):
    with pytest.raises(ConfigError, match=r"must divide the 6 key/value heads"):
        to_grouped_query(tiny(), heads)


def test_what_cannot_be_pooled_is_refused():
    model = tiny()
    with pytest.raises(InputError, match="give config="):
        to_grouped_query(model.state_dict(), 2)
    with pytest.raises(InputError, match=r"k_proj\.weight has shape \(5, 3\)"):
        to_grouped_query({"k_proj.weight": torch.zeros(5, 3), "a.k_proj.weight": torch.zeros(5, 3)}, 2, model.config)
    model.prune_heads({0: [1]})
    with pytest.raises(InputError, match="pruned"):
        to_grouped_query(model, 2)
