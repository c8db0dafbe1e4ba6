"""The family as data: what a layer is made of, and what is refused."""

import math
import pickle

import pytest
import torch

import gemmakit
from gemmakit import GemmaConfig
from gemmakit.checkpoint.layout import tensor_shapes
from gemmakit.errors import ConfigError
from gemmakit.family import FULL_ATTENTION, KINDS, OPTIONAL, PRESETS, SLIDING_ATTENTION, kind_of, role_of
from gemmakit.pytorch.pretrained import wanted_shapes


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
    roles = set(KINDS["gemma"].classes)
    names = [name for kind in KINDS.values() for name in kind.classes.values()]
    assert len(names) == len(set(names))
    for model_type, kind in KINDS.items():
        assert kind_of(model_type) is kind
        assert kind.norms.before_attention
        assert kind.norms.before_mlp
        assert set(kind.classes) == roles
        common = {"layer_types", "sliding_window", "final_logit_softcapping"}
        assert common <= set(OPTIONAL) & set(kind.defaults) or not kind.defaults
        for role, name in kind.classes.items():
            assert role_of(name) == role_of(f"Flax{name}") == (model_type, role)
            public = getattr(gemmakit, name)
            assert public.__name__ == name
            assert issubclass(public, getattr(gemmakit, KINDS["gemma"].classes[role]))


@pytest.mark.parametrize("model_type", ["gemma3n", "gemma3n_text", "paligemma", "recurrent_gemma", "llama", None, 3])
def test_what_is_no_member_is_refused_with_those_that_are(model_type):
    with pytest.raises(ConfigError, match=r"model_type is .*: gemmakit runs Gemma 1.*, Gemma 2 \('gemma2'\)"):
        kind_of(model_type)


def test_layers_of_windows_alternate_as_each_member_has_them():
    gemma2, gemma3 = GemmaConfig.preset("gemma2-2b"), GemmaConfig.preset("gemma3-4b")
    assert [gemma2.layer(i).window for i in range(4)] == [4096, None, 4096, None]
    assert [gemma3.layer(i).window for i in range(7)] == [1024] * 5 + [None, 1024]
    assert {gemma2.layer(i).rope for i in range(26)} == {FULL_ATTENTION}
    assert [gemma3.layer(i).rope for i in (0, 5)] == [SLIDING_ATTENTION, FULL_ATTENTION]
    assert gemma3.rope(SLIDING_ATTENTION) == {"rope_type": "default", "rope_theta": 10_000.0}
    assert gemma3.rope(FULL_ATTENTION) == {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}
    assert (gemma2.layer(0).softcap, gemma3.layer(0).softcap) == (50.0, None)
    assert GemmaConfig.preset("gemma3-27b").layer(0).scale == 168**-0.5


# Counted by Google, the tied head once; of Gemma 3 the sizes that read text alone.
PARAMETERS = {
    "2b": 2_506_172_416, "7b": 8_537_680_896, "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320, "gemma3-270m": 268_098_176, "gemma3-1b": 999_885_952,
}  # fmt: skip


@pytest.mark.parametrize("size", PARAMETERS)
def test_presets_have_the_released_models_number_of_parameters(size):
    assert sum(map(math.prod, tensor_shapes(GemmaConfig.preset(size)).values())) == PARAMETERS[size]


@pytest.mark.parametrize("size", PRESETS)
def test_checkpoints_hold_what_the_model_of_their_class_has(size):
    fewer = dict(num_hidden_layers=12, hidden_size=32, intermediate_size=48, vocab_size=64)
    shared = dict(num_kv_shared_layers=5) if PRESETS[size].get("num_kv_shared_layers") else {}
    config = GemmaConfig.preset(size, **fewer, **shared)
    with torch.device("meta"):
        model = getattr(gemmakit, config.kind.classes["causal_lm"])(config)
    assert tensor_shapes(config) == wanted_shapes(model)


REFUSED = {
    "window 0": (dict(sliding_window=0), "sliding_window is 0; it must be a whole number >= 1"),
    "cap": (dict(attn_logit_softcapping=-50.0), "attn_logit_softcapping is -50.0; it must be a finite number > 0"),
    "cap of logits": (dict(final_logit_softcapping=0), "final_logit_softcapping is 0; it must be a finite number > 0"),
    "scale": (dict(query_pre_attn_scalar=0), "query_pre_attn_scalar is 0; it must be"),
    "layer": (dict(layer_types=["sliding_attention", "chunked_attention"]), r"layer_types\[1\] is 'chunked_attention'"),
    "count": (dict(layer_types=["full_attention"]), "num_hidden_layers = 2"),
    "no window": (dict(sliding_window=None), "sliding_window is None: say how many keys"),
    "table": (dict(rope_local_base_freq=1e4), "one table serves all layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_layers_are_refused_with_field_value_and_limit(case):
    fields, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said):
        gemmakit.Gemma2Config(**{"num_hidden_layers": 2, **fields})


def test_what_gemma_1_has_not_is_refused_and_in_a_file_kept():
    with pytest.raises(ConfigError, match=r"sliding_window is 8; Gemma 1, 1\.1 and CodeGemma has no such setting"):
        GemmaConfig(sliding_window=8)
    read = GemmaConfig.from_dict({"model_type": "gemma", "sliding_window": 8})
    assert read.layer(0).window is None
    assert read.to_dict()["sliding_window"] == 8


def test_the_text_part_of_a_checkpoint_that_reads_images_is_a_text_model():
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    values = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 106]}
    config = GemmaConfig.from_dict(values)
    assert type(config) is gemmakit.Gemma3TextConfig
    assert (config.hidden_size, config.eos_token_ids) == (2560, (1, 106))
    assert config.rope(FULL_ATTENTION)["factor"] == 8.0
    assert "vision_config" not in config.to_dict()
    with pytest.raises(ConfigError, match="there is no text_config"):
        GemmaConfig.from_dict({"model_type": "gemma3", "vision_config": {}})


def test_gemma_1s_classes_open_every_member_and_the_others_their_own(tmp_path):
    fields = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    model = gemmakit.Gemma2ForCausalLM(gemmakit.Gemma2Config(**fields))
    model.save_pretrained(tmp_path)
    assert type(GemmaConfig.from_pretrained(tmp_path)) is gemmakit.Gemma2Config
    assert type(gemmakit.GemmaForCausalLM.from_pretrained(tmp_path)) is gemmakit.Gemma2ForCausalLM
    assert type(gemmakit.AutoModel.from_pretrained(tmp_path)) is gemmakit.Gemma2Model
    with pytest.raises(ConfigError, match="Gemma3ForCausalLM is for Gemma 3 and this model_type is 'gemma2'"):
        gemmakit.Gemma3ForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Gemma3ForCausalLM is for Gemma 3 and this model_type is 'gemma'"):
        gemmakit.Gemma3ForCausalLM(GemmaConfig(**fields))
    assert pickle.loads(pickle.dumps(model.config)) == model.config


def test_fewer_layers_are_the_first_of_a_files_layers():
    stored = gemmakit.Gemma3TextConfig(num_hidden_layers=12).to_dict()
    assert GemmaConfig.from_dict(stored, num_hidden_layers=6).layer_types == stored["layer_types"][:6]
    older = {"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window_pattern": 2}
    assert GemmaConfig.from_dict(older).layer_types == ["sliding_attention", "full_attention"] * 2


def test_a_base_for_windows_is_refused_wherever_one_table_serves_all_layers():
    config = GemmaConfig()
    with pytest.raises(ConfigError, match="one table serves all layers"):
        GemmaConfig.from_dict(config.to_dict(), rope_local_base_freq=5e3)
    with pytest.raises(ConfigError, match=r"rope_local_base_freq is 5000\.0"):
        config.rope_local_base_freq = 5e3
    assert config == GemmaConfig()
    gemma3 = gemmakit.Gemma3TextConfig()
    gemma3.rope_local_base_freq = 5e3
    assert (gemma3.rope(SLIDING_ATTENTION)["rope_theta"], gemma3.rope_theta) == (5e3, 1e6)
