"""config.json: each library reads what the other writes, with equal values."""

import json

import pytest
import transformers

import gemmakit
from gemmakit.family import PRESETS

FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "pad_token_id", "eos_token_id", "bos_token_id", "tie_word_embeddings", "attention_bias",
    "attention_dropout", "use_bidirectional_attention", "num_labels", "id2label", "label2id",
)  # fmt: skip
VARIANTS = {
    "defaults": {},
    "2b": PRESETS["2b"],
    "odd": dict(hidden_size=100, head_dim=14, num_attention_heads=6, num_key_value_heads=3, rms_norm_eps=1e-5,
                eos_token_id=[1, 107], pad_token_id=None, attention_bias=True, attention_dropout=0.25,
                tie_word_embeddings=False, use_cache=False, use_bidirectional_attention=True),
    "labels": dict(id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2}),
    "linear": dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama3": dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 1e4,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}),
}  # fmt: skip


def assert_equal(ours, theirs):
    for name in FIELDS:
        assert getattr(ours, name) == getattr(theirs, name), name
    mine, other = dict(ours.rope_parameters), dict(theirs.rope_parameters)
    assert mine == {k: v for k, v in other.items() if v is not None}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_same_arguments_mean_the_same(fields):
    assert_equal(gemmakit.GemmaConfig(**fields), transformers.GemmaConfig(**fields))


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_transformers_reads_what_gemmakit_writes(fields, tmp_path):
    ours = gemmakit.GemmaConfig(**fields, dtype="bfloat16")
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.GemmaConfig
    assert_equal(ours, theirs)
    assert str(theirs.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_gemmakit_reads_what_transformers_writes(fields, tmp_path):
    theirs = transformers.GemmaConfig(**fields, dtype="float16")
    theirs.save_pretrained(tmp_path)
    ours = gemmakit.GemmaConfig.from_pretrained(tmp_path)
    assert_equal(ours, theirs)
    assert ours.dtype == "float16"
    version = json.loads((tmp_path / "config.json").read_text())["transformers_version"]
    assert ours.transformers_version == version  # kept as data


def test_a_config_may_go_back_and_forth_without_change(tmp_path):
    ours = gemmakit.GemmaConfig(**VARIANTS["odd"], dtype="bfloat16")
    ours.save_pretrained(tmp_path / "a")
    transformers.GemmaConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    back = gemmakit.GemmaConfig.from_pretrained(tmp_path / "b")
    assert_equal(back, transformers.GemmaConfig.from_pretrained(tmp_path / "a"))
    assert_equal(ours, back)
