"""GenerationConfig: where settings come from, which win, how they are written. Ranges: test_generate_faults."""

import copy
import json
import pickle

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from gemmakit import GemmaConfig, GenerationConfig
from gemmakit.errors import CheckpointError, GenerationConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # combinations without effect warn; that has its own tests

settings_of = st.fixed_dictionaries(
    {},
    optional={
        "max_length": st.integers(200, 10**6), "max_new_tokens": st.integers(200, 10**6),
        "min_length": st.integers(0, 99), "min_new_tokens": st.integers(0, 99), "max_time": st.floats(1e-3, 1e6),
        "do_sample": st.booleans(), "temperature": st.floats(1e-3, 1e3), "top_k": st.integers(0, 999),
        "top_p": st.floats(0, 1), "min_p": st.floats(0, 1), "repetition_penalty": st.floats(1e-3, 1e3),
        "seed": st.integers(0, 2**63 - 1), "use_cache": st.booleans(), "prefill_chunk_size": st.integers(1, 999),
        "cache_implementation": st.sampled_from(["dynamic", "static"]),
        "stop_strings": st.one_of(st.text(min_size=1, max_size=4), st.lists(st.text(min_size=1), max_size=3)),
        "eos_token_id": st.one_of(st.integers(0, 99), st.lists(st.integers(0, 99), max_size=3)),
        "pad_token_id": st.integers(0, 99), "return_dict_in_generate": st.booleans(),
    },
)  # fmt: skip


def test_defaults_are_plain_greedy_decoding_with_a_cache():
    config = GenerationConfig()
    assert not config.do_sample
    assert config.max_length is config.max_new_tokens is config.eos_token_id is config.seed is None
    assert (config.temperature, config.top_p, config.top_k, config.repetition_penalty) == (1.0, 1.0, 50, 1.0)
    assert config.use_cache
    assert config.num_return_sequences == 1


@given(settings=settings_of)
def test_what_is_written_reads_back_equal(settings):
    config = GenerationConfig(**settings)
    again = GenerationConfig.from_dict(json.loads(config.to_json_string()))
    for name, value in settings.items():
        assert getattr(config, name) == value
        assert getattr(again, name) == value, name
    assert again == config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))


@given(settings=settings_of)
def test_a_changed_copy_leaves_the_original_alone(settings):
    config = GenerationConfig()
    before = config.to_json_string()
    changed = config.updated(**settings)
    assert config.to_json_string() == before
    for name, value in settings.items():
        assert getattr(changed, name) == value


def test_the_models_tokens_become_the_defaults():
    config = GenerationConfig.from_model_config(GemmaConfig(eos_token_id=[1, 107], use_cache=False))
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, [1, 107])
    assert config.eos_token_ids == (1, 107)
    assert not config.use_cache


def test_a_released_file_is_read_and_its_unknown_keys_are_kept(tmp_path):
    released = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
                "transformers_version": "4.38.0.dev0", "future_setting": [1, {"a": None}]}  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(released))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_ids == (1,)
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written["future_setting"] == [1, {"a": None}]
    assert GenerationConfig.from_pretrained(tmp_path, max_new_tokens=3).max_new_tokens == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100000])
def test_files_that_are_no_json_object_are_refused(text, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)


def test_a_bad_value_in_a_file_is_named(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": -1, "do_sample": true}')
    with pytest.raises(GenerationConfigError, match=r"generation_config.json: temperature is -1"):
        GenerationConfig.from_pretrained(tmp_path)


UNREAD = {"temperature": 0.0, "top_k": -1, "top_p": 2, "min_p": -0.1, "typical_p": 0, "epsilon_cutoff": 1}


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.filterwarnings("ignore:.*do_sample is False")
def test_a_bad_value_that_nothing_reads_stops_no_loading_and_no_other_call(name):
    """A call's own is refused at once; a file's when something reads it, by its name, until the call gives another."""
    config = GenerationConfig.from_dict({name: UNREAD[name], "do_sample": False})
    assert config.updated(max_new_tokens=3).to_dict() == {name: UNREAD[name], "max_new_tokens": 3}  # it is saved again
    with pytest.raises(GenerationConfigError, match=f"^{name} is .*The model's own settings say so"):
        config.updated(do_sample=True)
    default = getattr(GenerationConfig(), name)
    assert config.updated(do_sample=True, **{name: default}).to_dict() == {"do_sample": True}
    for own in (lambda: config.updated(**{name: UNREAD[name]}), lambda: GenerationConfig(**{name: UNREAD[name]})):
        with pytest.raises(GenerationConfigError, match=f"^{name} is"):
            own()


def test_settings_of_an_older_config_json_are_read_as_transformers_reads_them(tmp_path):
    """Before there was generation_config.json, config.json held them."""
    held = dict(max_length=9, do_sample=True, top_k=5, repetition_penalty=1.5)
    (tmp_path / "config.json").write_text(json.dumps({**GemmaConfig().to_dict(), **held}))
    ours = GenerationConfig.from_model_config(GemmaConfig.from_pretrained(tmp_path))
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path, config_file_name="config.json")
    assert {n: getattr(ours, n) for n in held} == {n: getattr(theirs, n) for n in held} == held
    assert (ours.eos_token_id, ours.bos_token_id, ours.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("how", ["init", "updated"])
def test_unknown_settings_are_refused_with_the_nearest_name(how):
    make = GenerationConfig if how == "init" else GenerationConfig().updated
    with pytest.raises(GenerationConfigError, match=r"'temprature'.*'temperature'"):
        make(temprature=0.5)
