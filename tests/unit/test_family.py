"""The family as data: what a layer is made of, and what is refused."""

import pytest

from gemmakit import GemmaConfig
from gemmakit.errors import ConfigError
from gemmakit.family import KINDS, kind_of


def test_a_layer_says_its_shape_and_scale():
    config = GemmaConfig.preset("2b")
    first = config.layer(0)
    assert (first.num_attention_heads, first.num_key_value_heads, first.head_dim) == (8, 1, 256)
    assert first.intermediate_size == 16384
    assert first.scale == 256**-0.5
    assert (first.window, first.softcap, first.kv_source) == (None, None, None)
    assert {config.layer(i) for i in range(config.num_hidden_layers)} == {first}
    assert config.rope(first.rope) == config.rope_parameters


def test_a_pruned_layer_has_fewer_heads_and_the_others_all():
    config = GemmaConfig(num_attention_heads=6, num_key_value_heads=3, pruned_heads={"1": [2, 3]})
    assert [(s.num_attention_heads, s.num_key_value_heads) for s in map(config.layer, range(2))] == [(6, 3), (4, 2)]
    assert config.heads(1) == ([0, 1, 4, 5], [0, 2])


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="layer 28 does not exist: there are 28"):
        GemmaConfig().layer(28)


def test_every_member_names_its_norms_and_classes():
    for model_type, kind in KINDS.items():
        assert kind_of(model_type) is kind
        assert kind.norms.before_attention
        assert kind.norms.before_mlp
        assert {"config", "model", "causal_lm"} <= set(kind.classes)


@pytest.mark.parametrize("model_type", ["gemma2", "llama", None, 3, ["gemma"]])
def test_what_is_no_member_is_refused_with_those_that_are(model_type):
    with pytest.raises(ConfigError, match=r"model_type is .*: gemmakit runs Gemma 1, 1\.1 and CodeGemma \('gemma'\)"):
        kind_of(model_type)
