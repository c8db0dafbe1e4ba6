"""GemmaConfig: defaults, spellings, released files, refusals, round trips."""

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import gemmakit
from gemmakit import GemmaConfig
from gemmakit.errors import CheckpointError, ConfigError

# The signature of transformers 4.38, in its order.
POSITIONAL = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "pad_token_id", "eos_token_id", "bos_token_id", "tie_word_embeddings", "rope_theta",
    "attention_bias", "attention_dropout",
)  # fmt: skip
DEFAULTS = (256000, 3072, 24576, 28, 16, 16, 256, "gelu_pytorch_tanh", 8192, 0.02, 1e-6, True, 0, 1, 2, True, 10000.0,
            False, 0.0)  # fmt: skip

# The released files, as they are on the Hub.
RELEASED_2B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
    "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.38.1", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
RELEASED_11_7B = {
    **RELEASED_2B, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3072,
    "intermediate_size": 24576, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16,
    "transformers_version": "4.40.0.dev0",
}  # fmt: skip
RELEASED_CODE_2B = {
    **RELEASED_2B, "hidden_activation": "gelu_pytorch_tanh", "transformers_version": "4.42.0.dev0",
    "_name_or_path": "/some/where", "unknown_future_key": {"nested": [1, None, "x"]},
}  # fmt: skip
RELEASED = {"gemma-2b": RELEASED_2B, "gemma-1.1-7b-it": RELEASED_11_7B, "codegemma-2b": RELEASED_CODE_2B}


@pytest.fixture(autouse=True)
def _quiet_gelu():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hidden_act")
        yield


def read(values, folder, **overrides):
    (folder / "config.json").write_text(json.dumps(values))
    return GemmaConfig.from_pretrained(folder, **overrides)


def test_defaults_and_positional_order_are_those_of_the_first_release():
    config = GemmaConfig()
    assert tuple(getattr(config, name) for name in POSITIONAL) == DEFAULTS
    assert tuple(inspect.signature(GemmaConfig).parameters)[: len(POSITIONAL)] == POSITIONAL
    given_in_order = GemmaConfig(*DEFAULTS[:3], 5, 6, 3, 10, *DEFAULTS[7:16], 500.0, True, 0.5)
    assert (given_in_order.num_hidden_layers, given_in_order.num_attention_heads) == (5, 6)
    assert (given_in_order.num_key_value_heads, given_in_order.head_dim) == (3, 10)
    assert (given_in_order.rope_theta, given_in_order.attention_bias) == (500.0, True)
    assert given_in_order.attention_dropout == 0.5


def test_presets_are_the_released_sizes():
    two = GemmaConfig.preset("2b")
    assert (two.hidden_size, two.intermediate_size, two.num_hidden_layers) == (2048, 16384, 18)
    assert (two.num_attention_heads, two.num_key_value_heads, two.head_dim) == (8, 1, 256)
    assert GemmaConfig.preset("7b") == GemmaConfig()
    assert GemmaConfig.preset("2b", num_hidden_layers=3).num_hidden_layers == 3
    with pytest.raises(ConfigError, match=r"'9b'.*2b, 7b"):
        GemmaConfig.preset("9b")


def test_none_means_as_many_kv_heads_as_heads_and_the_width_over_the_heads():
    config = GemmaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=None, head_dim=None)
    assert config.num_key_value_heads == 6
    assert config.head_dim == 16


# -- rotary spellings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        dict(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0}),
        dict(rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}),
        dict(rope_theta=500.0, rope_parameters={"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_three_rotary_spellings_read_as_one(spelling):
    config = GemmaConfig(**spelling)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert config.rope_theta == 500.0
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_all_three_rotary_spellings_are_written_and_can_be_assigned():
    written = GemmaConfig(rope_theta=500.0, rope_scaling={"type": "dynamic", "factor": 2.0}).to_dict()
    assert written["rope_theta"] == 500.0
    assert written["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.0}
    assert written["rope_parameters"] == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    config = GemmaConfig()
    config.rope_theta = 7.0
    config.rope_scaling = {"type": "linear", "factor": 3.0}
    assert config.rope_parameters == {"rope_type": "linear", "factor": 3.0, "rope_theta": 7.0}
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0}


def test_contradicting_rotary_spellings_are_refused():
    with pytest.raises(ConfigError, match=r"rope_theta is 5.0, but rope_parameters says 6.0"):
        GemmaConfig(rope_theta=5.0, rope_parameters={"rope_type": "default", "rope_theta": 6.0})


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 128, "long_factor": [2.0] * 128}


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "cubic"}, "rope_type is 'cubic'.*longrope"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"full_attention": {"rope_type": "default", "rope_theta": 5e5}}, "'full_attention'"),
        ({"rope_type": "linear"}, "needs 'factor'"),
        ({"rope_type": "linear", "factor": None}, "needs 'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5.*>= 1"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2'"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta is -1.0.*> 0"),
        ({"rope_type": "default", "rope_theta": math.nan}, "rope_theta is nan"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta is 1.0.*> 1"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": "many"}, "beta_fast is 'many'"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor is 1.0.*above low_freq_factor, 1.0"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({**LONG, "long_factor": [2.0] * 5}, "long_factor.*head_dim 256 needs a list of 128"),
        ({**LONG, "long_factor": 2.0}, "long_factor is 2.0.*list of 128"),
        ({**LONG, "short_factor": [0.0] * 128}, "short_factor is 0.0"),
        ([1, 2], "must be a dictionary"),
    ],
)
def test_impossible_rotary_settings_are_refused_by_name(rope, named):
    with pytest.raises(ConfigError, match=named):
        GemmaConfig(rope_parameters=rope)


def test_every_good_rotary_type_is_accepted():
    for rope in (LLAMA3, LONG, {"rope_type": "yarn", "factor": 2.0, "attention_factor": None}):
        assert GemmaConfig(rope_parameters=rope).rope_parameters["rope_type"] == rope["rope_type"]


# -- released files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", RELEASED.values(), ids=RELEASED)
def test_released_files_are_read_and_kept_whole(values, tmp_path):
    config = read(values, tmp_path)
    for name, value in values.items():
        if name not in ("hidden_act", "hidden_activation", "_name_or_path"):
            assert getattr(config, name) == value, name
    assert config.hidden_act == config.hidden_activation == "gelu_pytorch_tanh"
    assert config.dtype == "bfloat16"
    written = config.to_dict()
    for name in values.keys() - {"hidden_act", "hidden_activation", "_name_or_path"}:
        assert written[name] == values[name], name


def test_the_legacy_gelu_says_once_that_it_means_the_tanh_form():
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "from gemmakit import GemmaConfig\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    acts = [GemmaConfig(hidden_act='gelu').hidden_act for _ in range(3)]\n"
        "print(acts, [str(w.message) for w in seen if 'gelu' in str(w.message)])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count("gelu_pytorch_tanh'") == 3
    assert out.count("legacy value") == 1


def test_hidden_activation_wins_over_hidden_act():
    assert GemmaConfig(hidden_act="gelu", hidden_activation="relu").hidden_act == "relu"
    with pytest.raises(ConfigError, match=r"hidden_act is 'swish2'.*gelu_pytorch_tanh"):
        GemmaConfig(hidden_act="swish2")


def test_unknown_keys_of_a_file_are_kept_read_as_attributes_and_written_back(tmp_path):
    config = read(RELEASED_CODE_2B, tmp_path)
    assert config.unknown_future_key == {"nested": [1, None, "x"]}
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["unknown_future_key"] == {"nested": [1, None, "x"]}
    with pytest.raises(AttributeError, match="no_such_field"):
        config.no_such_field


def test_code_fields_are_data_and_never_run(tmp_path):
    flag = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(flag)!r}, 'w').close()\nclass Config: pass\n")
    dangerous = {
        **RELEASED_2B, "auto_map": {"AutoConfig": "evil.Config"}, "custom_pipelines": {"x": {"impl": "evil.P"}},
        "__deepcopy__": "os.system", "__reduce__": ["os.system", ["x"]], "__class__": "x", "validate": "x",
        "to_dict": None, "extra": {"a": 1},
    }  # fmt: skip
    config = read(dangerous, tmp_path)
    assert not flag.exists()
    assert config.auto_map == {"AutoConfig": "evil.Config"}
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
    written = config.to_dict()
    for name in dangerous.keys() - {"hidden_act", "hidden_activation"}:
        assert written[name] == dangerous[name], name


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="model_type is 'gemma3n'"):
        read({**RELEASED_2B, "model_type": "gemma3n"}, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100000])
def test_files_that_are_no_json_object_are_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GemmaConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GemmaConfig.from_pretrained(tmp_path)


# -- overrides -------------------------------------------------------------------------------------------------------

LINEAR_FILE = {**RELEASED_2B, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}


@pytest.mark.parametrize("newer", [False, True], ids=["old_file", "own_file"])
@pytest.mark.parametrize(
    ("override", "rope"),
    [
        (dict(rope_theta=7.0), {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}),
        (dict(rope_scaling={"type": "dynamic", "factor": 3.0}), {"rope_type": "dynamic", "factor": 3.0,
                                                                "rope_theta": 500.0}),
        (dict(rope_scaling=None), {"rope_type": "default", "rope_theta": 500.0}),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 9.0}), {"rope_type": "default",
                                                                            "rope_theta": 9.0}),
        ({}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}),
    ],
)  # fmt: skip
def test_rotary_overrides_win_over_every_spelling_in_the_file(newer, override, rope, tmp_path):
    values = GemmaConfig.from_dict(LINEAR_FILE).to_dict() if newer else LINEAR_FILE
    assert read(values, tmp_path, **override).rope_parameters == rope


def test_overrides_win_over_the_files_other_spelling(tmp_path):
    values = GemmaConfig(dtype="bfloat16").to_dict()
    assert read(values, tmp_path, hidden_act="relu").hidden_act == "relu"
    assert read(values, tmp_path, torch_dtype="float16").dtype == "float16"
    assert read(values, tmp_path, num_labels=5).num_labels == 5
    assert read(values, tmp_path, attention_dropout=0.5, num_hidden_layers=2).num_hidden_layers == 2


def test_misspelt_overrides_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'num_kv_heads'.*'num_key_value_heads'"):
        read(RELEASED_2B, tmp_path, num_kv_heads=4)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_kv_heads", "num_key_value_heads"), ("n_layers", "num_hidden_layers"), ("d_model", "hidden_size"),
        ("hiden_size", "hidden_size"), ("max_seq_len", "max_position_embeddings"), ("vocabsize", "vocab_size"),
        ("rope_base", "rope_theta"), ("rms_norm_epsilon", "rms_norm_eps"),
    ],
)  # fmt: skip
def test_misspelt_keywords_are_refused_with_the_field_that_was_meant(name, meant):
    with pytest.raises(ConfigError, match=f"'{name}'.*'{meant}'"):
        GemmaConfig(**{name: 4})
    with pytest.raises(ConfigError, match=f"'{name}'.*'{meant}'"):
        GemmaConfig().update({name: 4})


def test_update_checks_and_translates():
    config = GemmaConfig()
    config.update({"hidden_act": "gelu", "torch_dtype": "bfloat16", "num_labels": 4})
    assert (config.hidden_act, config.dtype, config.num_labels) == ("gelu_pytorch_tanh", "bfloat16", 4)
    with pytest.raises(ConfigError, match="head_dim is 3"):
        config.update({"head_dim": 3})


WHOLE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
REAL = ("rms_norm_eps", "initializer_range", "attention_dropout", "rope_theta")
FLAGS = ("use_cache", "tie_word_embeddings", "attention_bias")
TOKENS = ("pad_token_id", "eos_token_id", "bos_token_id")
no_number = st.one_of(st.text(max_size=5), st.lists(st.integers(), max_size=2), st.booleans(), st.binary(max_size=3))
no_finite = st.sampled_from([math.nan, math.inf, -math.inf, 10**400, -(10**400)])
negative = st.floats(max_value=-1e-300, allow_nan=False)
BAD = st.one_of(
    st.tuples(st.sampled_from(WHOLE), st.one_of(st.integers(max_value=0), st.floats(), no_number)),
    st.tuples(st.sampled_from(REAL), st.one_of(no_finite, negative, no_number)),
    st.tuples(st.just("attention_dropout"), st.floats(min_value=1.0)),
    st.tuples(st.sampled_from(FLAGS), st.one_of(st.integers(), st.text(max_size=5), st.none())),
    st.tuples(
        st.sampled_from(TOKENS),
        st.one_of(st.integers(max_value=-2), st.integers(min_value=256000), st.floats(), st.booleans(), st.text()),
    ),
    st.tuples(st.just("num_labels"), st.one_of(st.integers(max_value=0), st.floats(), st.text())),
)


@given(bad=BAD, derived=st.booleans())
@example(bad=("hidden_size", "wide"), derived=True)
@example(bad=("num_attention_heads", 0), derived=True)
@example(bad=("eos_token_id", 1.5), derived=False)
def test_impossible_values_are_refused_naming_field_and_value(bad, derived):
    name, value = bad
    more = {"head_dim": None} if derived and name != "head_dim" else {}
    with pytest.raises(ConfigError) as refusal:
        GemmaConfig(**{name: value, **more})
    assert str(refusal.value).startswith(f"{name} is {value!r}")
    assert "must be" in str(refusal.value)


def test_limits_stand_in_the_message():
    for fields, message in [
        (dict(num_key_value_heads=5), "num_key_value_heads is 5, which does not divide num_attention_heads = 16"),
        (dict(head_dim=7), "head_dim is 7.*even"),
        (dict(pad_token_id=300000), "pad_token_id is 300000.*at most 255999"),
        (dict(eos_token_id=[1, 256000]), "eos_token_id is 256000.*at most 255999"),
        (dict(attention_dropout=1.0), "attention_dropout is 1.0.*>= 0.0 and < 1.0"),
        (dict(num_labels=3, id2label={0: "a"}), "num_labels is 3, but id2label names 1"),
        (dict(id2label={"x": "a"}), "id2label"),
        (dict(id2label=["a"]), "id2label"),
    ]:
        with pytest.raises(ConfigError, match=message):
            GemmaConfig(**fields)


def test_config_errors_are_value_errors():
    with pytest.raises(ValueError):
        GemmaConfig(hidden_size=0)


def test_minus_one_stands_for_no_token():
    assert GemmaConfig(pad_token_id=-1, eos_token_id=None).eos_token_ids == ()
    assert GemmaConfig(eos_token_id=[1, 107]).eos_token_ids == (1, 107)


# -- round trips -----------------------------------------------------------------------------------------------------

configs = st.builds(
    lambda groups, kv, half, **more: GemmaConfig(
        num_key_value_heads=kv, num_attention_heads=kv * groups, head_dim=2 * half, **more
    ),
    groups=st.integers(1, 4),
    kv=st.integers(1, 4),
    half=st.integers(2, 64),
    hidden_size=st.integers(1, 5000),
    rms_norm_eps=st.floats(0, 1),
    eos_token_id=st.one_of(st.integers(0, 99), st.lists(st.integers(0, 99), min_size=1, max_size=3), st.none()),
    tie_word_embeddings=st.booleans(),
    attention_bias=st.booleans(),
    use_bidirectional_attention=st.sampled_from([None, True, False]),
    rope_theta=st.one_of(st.none(), st.floats(1.0, 1e7)),
    rope_scaling=st.one_of(st.none(), st.fixed_dictionaries({"type": st.just("linear"), "factor": st.floats(1, 99)})),
    hidden_act=st.sampled_from(["gelu_pytorch_tanh", "gelu_erf", "relu"]),
    num_labels=st.integers(1, 4),
    problem_type=st.sampled_from([None, "regression"]),
    dtype=st.sampled_from([None, "bfloat16", "torch.float16"]),
)


@given(config=configs)
def test_what_is_written_reads_back_equal(config):
    again = GemmaConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    for name in config.to_dict():
        assert getattr(again, name) == getattr(config, name), name
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


@given(config=configs, field=st.sampled_from(["hidden_size", "rms_norm_eps", "eos_token_id", "rope_theta"]))
def test_configs_that_differ_are_not_equal(config, field):
    other = copy.deepcopy(config)
    setattr(other, field, 5001)
    assert other != config


def test_what_is_given_is_copied_and_never_changed():
    rope, eos, extra = {"rope_type": "longrope", "long_factor": [1.0] * 128, "short_factor": [1.0] * 128}, [1, 2], [3]
    config = GemmaConfig(rope_parameters=rope, eos_token_id=eos, unknown_future_key=extra)
    config.rope_parameters["long_factor"][0] = 2.0
    config.rope_theta = 7.0
    config.eos_token_id.append(5)
    config.unknown_future_key.append(5)
    assert (rope["long_factor"][0], "rope_theta" in rope, eos, extra) == (1.0, False, [1, 2], [3])


def test_a_model_has_a_configuration_of_its_own():
    config = GemmaConfig(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, head_dim=4)  # fmt: skip
    before = copy.deepcopy(vars(config))
    for cls in (gemmakit.GemmaModel, gemmakit.GemmaForCausalLM, gemmakit.GemmaForSequenceClassification):
        model = cls(config)
        model.resize_token_embeddings(11)
        assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == {id(model.config)}
    assert vars(config) == before


def test_a_changed_dictionary_leaves_the_config_alone():
    config = GemmaConfig(eos_token_id=[1, 2])
    config.to_dict()["rope_parameters"]["rope_theta"] = 1.0
    config.to_dict()["eos_token_id"].append(5)
    assert config.rope_theta == 10000.0
    assert config.eos_token_id == [1, 2]


def test_labels_are_counted_named_and_read_back(tmp_path):
    config = GemmaConfig(id2label={"0": "no", "1": "yes", "2": "maybe"})
    assert config.num_labels == 3
    assert config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    config.save_pretrained(tmp_path)
    assert GemmaConfig.from_pretrained(tmp_path).id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert gemmakit.GemmaConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size", "num_labels"])
def test_a_configuration_too_large_to_build_is_refused_at_once(field):
    with pytest.raises(ConfigError, match=rf"{field} is 2000000000000; .* at most \d+"):
        GemmaConfig(**{field: 2 * 10**12})


def test_a_field_that_is_not_there_says_what_it_may_be_called():
    with pytest.raises(AttributeError, match=r"no field '_sliding_window'\. Its name here is 'sliding_window'"):
        GemmaConfig()._sliding_window
    with pytest.raises(AttributeError, match=r"no field 'window_size'\.$"):
        GemmaConfig().window_size
