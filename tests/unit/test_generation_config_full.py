"""GenerationConfig: ranges, contradictions, warnings, files."""

import json
import math
import warnings

import pytest
import transformers

from gemmakit import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig
from gemmakit.checks import OneOf, Real, TokenIds, Whole, ranges
from gemmakit.errors import GenerationConfigError, TokenOutOfRange
from gemmakit.generation.settings import DEFAULTS, REFUSED

pytestmark = pytest.mark.filterwarnings("error")

RANGES = {name: r for name, r in ranges(GenerationConfig).items() if not isinstance(r, TokenIds)}

# For each field, a value that the rest of the settings leaves alone.
COMPANY = {
    "num_beam_groups": {"num_beams": 4, "diversity_penalty": 0.5},
    "diversity_penalty": {"num_beams": 4, "num_beam_groups": 2},
    "constraints": {"num_beams": 2},
    "force_words_ids": {"num_beams": 2},
}
OTHER = {
    "max_length": 30, "max_new_tokens": 7, "min_length": 3, "min_new_tokens": 2, "max_time": 1.5,
    "stop_strings": ["x", "yz"],
    "do_sample": True, "num_beams": 3, "early_stopping": "never", "length_penalty": -0.5, "num_beam_groups": 2,
    "diversity_penalty": 0.7, "force_words_ids": [[3, 4]], "penalty_alpha": 0.6, "low_memory": True,
    "is_assistant": True, "num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1, "prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3,
    "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "top_h": 0.4, "typical_p": 0.5,
    "epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "repetition_penalty": 1.1, "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 3, "bad_words_ids": [[4], [5, 6]],
    "suppress_tokens": [7], "begin_suppress_tokens": [8], "sequence_bias": {(1, 2): -1.5, (3,): 2.0},
    "forced_bos_token_id": 2, "forced_eos_token_id": [1, 107], "exponential_decay_length_penalty": (3, 1.2),
    "guidance_scale": 1.5, "remove_invalid_values": True, "renormalize_logits": True,
    "watermarking_config": {"bias": 3.0}, "token_healing": True, "use_cache": False,
    "cache_implementation": "static", "cache_config": {"bits": 4}, "num_return_sequences": 2,
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True,
    "output_hidden_states": True, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": [1, 107],
}  # fmt: skip
OURS = {"seed": 3, "prefill_chunk_size": 16, "json_schema": {"type": "object"}, "regex": "a+", "grammar": 'start: "a"',
        "cuda_graphs": False, "speculate": False, "max_cache_len": 64, "constraints": ["any object"]}  # fmt: skip


def quiet(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GenerationConfig(**settings)


def test_every_field_is_checked_and_tested():
    structured = {"stop_strings", "sequence_bias", "exponential_decay_length_penalty", "watermarking_config"}
    assert set(ranges(GenerationConfig)) | structured == set(DEFAULTS)
    assert set(OTHER) | set(OURS) == set(DEFAULTS)


def test_every_documented_setting_of_transformers_is_known_or_refused_with_a_reason():
    theirs = {k for k in vars(transformers.GenerationConfig()) if not k.startswith("_")}
    assert theirs - {"transformers_version"} - set(DEFAULTS) == set(REFUSED)


def test_defaults_are_the_documented_ones():
    documented = transformers.GenerationConfig._get_default_generation_params()
    ours = vars(GenerationConfig())
    differing = {k for k, v in documented.items() if k in ours and ours[k] != v}
    assert differing == {"max_length"}  # 20 new tokens beyond the prompt, not 20 tokens with it


@pytest.mark.parametrize("name", sorted(OTHER | OURS))
def test_round_trip(name, tmp_path):
    value = {**OTHER, **OURS}[name]
    config = quiet(**{**COMPANY.get(name, {}), name: value})
    assert getattr(config, name) != DEFAULTS[name]
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert GenerationConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("name", sorted(OTHER))
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(name, tmp_path):
    settings = {**COMPANY.get(name, {}), name: OTHER[name]}
    if name == "num_return_sequences":
        settings["do_sample"] = True
    ours = quiet(**settings)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
    for key in settings:
        mine, other = getattr(ours, key), getattr(theirs, key)
        mine = mine.to_dict() if hasattr(mine, "to_dict") else mine
        other = other.to_dict() if hasattr(other, "to_dict") else other
        other = {tuple(ids): bias for ids, bias in other} if key == "sequence_bias" else other
        assert mine == (tuple(other) if isinstance(mine, tuple) else other)
    (tmp_path / "theirs").mkdir()
    theirs.to_json_file(tmp_path / "theirs" / "generation_config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = GenerationConfig.from_pretrained(tmp_path / "theirs")
    back.extra = {}
    assert back == ours


def test_a_bias_keyed_by_tuples_survives_transformers_json():
    theirs = transformers.GenerationConfig(sequence_bias={(1, 2): -1.5, (3,): 2.0})
    assert GenerationConfig.from_dict(json.loads(theirs.to_json_string())).biases == {(1, 2): -1.5, (3,): 2.0}


def test_synthid_settings_are_known_by_their_keys():
    config = quiet(watermarking_config={"ngram_len": 5, "keys": [1, 2]})
    assert isinstance(config.watermark, SynthIDTextWatermarkingConfig)
    again = GenerationConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config


def _outside(allowed):
    if isinstance(allowed, OneOf):
        return ["nonsense", 2]
    if isinstance(allowed, Whole | Real):
        bad = [math.nan, math.inf, -math.inf, "1", True, [1], 10**400]
        bad.append(allowed.low if getattr(allowed, "above", False) else allowed.low - 1)
        if allowed.high != math.inf:
            bad.append(allowed.high if getattr(allowed, "below", False) else allowed.high + 1)
        return [b for b in bad if b != 10**400] + [1.5] if isinstance(allowed, Whole) else bad
    return ["", [], 3] if str in allowed.types else ["", [], {}]


@pytest.mark.parametrize("name", sorted(RANGES))
def test_out_of_range_names_field_value_and_range(name):
    for value in _outside(RANGES[name]):
        with pytest.raises(GenerationConfigError) as e:
            quiet(**{**COMPANY.get(name, {}), name: value})
        assert name in str(e.value)
        assert repr(value) in str(e.value)
        assert str(RANGES[name]) in str(e.value)


@pytest.mark.parametrize(
    ("name", "value", "token"),
    [
        ("eos_token_id", [1, 300], 300),
        ("pad_token_id", 256, 256),
        ("bos_token_id", 999, 999),
        ("forced_bos_token_id", 256, 256),
        ("forced_eos_token_id", [3, 256], 256),
        ("suppress_tokens", [5, 256], 256),
        ("begin_suppress_tokens", [700], 700),
        ("bad_words_ids", [[3], [4, 512]], 512),
        ("sequence_bias", {(3, 400): 1.0}, 400),
        ("force_words_ids", [[[3], [256]], [[4]]], 256),
    ],
)
def test_token_outside_the_vocabulary_is_named_with_its_size(name, value, token):
    config = quiet(**{**COMPANY.get(name, {}), name: value})
    config.validate(1000)
    with pytest.raises(TokenOutOfRange, match=rf"{name} .*\b{token}\b.*\b256\b"):
        config.validate(256)


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": [-1]},
        {"suppress_tokens": [1.0]},
        {"suppress_tokens": 3},
        {"suppress_tokens": [True]},
        {"bad_words_ids": []},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [1, [2]]},
        {"bad_words_ids": [[[1]]]},
        {"eos_token_id": "1"},
        {"eos_token_id": -2},
        {"sequence_bias": {}},
        {"sequence_bias": {(): 1.0}},
        {"sequence_bias": {(1,): "much"}},
        {"sequence_bias": {(1,): math.nan}},
        {"sequence_bias": [[1, 2, 3]]},
        {"sequence_bias": 4},
        {"stop_strings": [""]},
        {"stop_strings": [3]},
        {"exponential_decay_length_penalty": (1,)},
        {"exponential_decay_length_penalty": (1.5, 2.0)},
        {"exponential_decay_length_penalty": (1, 0.0)},
        {"watermarking_config": 3},
        {"watermarking_config": {"bais": 1.0}},
        {"watermarking_config": {"greenlist_ratio": 1.0}},
        {"watermarking_config": {"seeding_scheme": "other"}},
        {"watermarking_config": {"ngram_len": 5, "keys": []}},
        {"watermarking_config": {"ngram_len": 1, "keys": [1]}},
    ],
    ids=str,
)
def test_malformed_values_are_refused(settings):
    with pytest.raises(GenerationConfigError, match=next(iter(settings)) if "bais" not in str(settings) else "bias"):
        quiet(**settings)


@pytest.mark.parametrize(
    ("settings", "both"),
    [
        ({"num_beam_groups": 2}, ("num_beam_groups", "num_beams")),
        ({"num_beam_groups": 2, "num_beams": 3, "diversity_penalty": 1.0}, ("num_beam_groups", "num_beams")),
        ({"num_beam_groups": 2, "num_beams": 4}, ("num_beam_groups", "diversity_penalty")),
        (
            {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 1.0, "do_sample": True},
            ("num_beam_groups", "do_sample"),
        ),
        ({"diversity_penalty": 0.5, "num_beams": 4}, ("diversity_penalty", "num_beam_groups")),
        ({"num_beams": 2, "num_return_sequences": 3}, ("num_return_sequences", "num_beams")),
        ({"force_words_ids": [[1]]}, ("force_words_ids", "num_beams")),
        ({"constraints": ["c"], "num_beams": 2, "do_sample": True}, ("constraints", "do_sample")),
        ({"constraints": ["c"], "force_words_ids": [[1]], "num_beams": 2}, ("constraints", "force_words_ids")),
        ({"penalty_alpha": 0.6, "do_sample": True}, ("penalty_alpha", "do_sample")),
        ({"penalty_alpha": 0.6, "num_beams": 2}, ("penalty_alpha", "num_beams")),
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, ("prompt_lookup_num_tokens", "num_beams")),
        ({"regex": "a", "grammar": "b"}, ("regex", "grammar")),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, ("min_new_tokens", "max_new_tokens")),
        ({"min_length": 5, "max_length": 4}, ("min_length", "max_length")),
        ({"forced_eos_token_id": [3, 4], "suppress_tokens": [4, 3]}, ("forced_eos_token_id", "suppress_tokens")),
        ({"forced_bos_token_id": 3, "suppress_tokens": [3]}, ("forced_bos_token_id", "suppress_tokens")),
    ],
    ids=str,
)
def test_contradictions_name_both_settings(settings, both):
    with pytest.raises(GenerationConfigError) as e:
        quiet(**settings)
    assert all(name in str(e.value) for name in both)
    with pytest.raises(GenerationConfigError):
        GenerationConfig().updated(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        *({n: OTHER[n]} for n in ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "eta_cutoff")),
        {"epsilon_cutoff": 0.1},
        {"early_stopping": True},
        {"length_penalty": 2.0},
        {"max_cache_len": 64},
        {"output_scores": True},
        {"low_memory": True},
        {"min_new_tokens": 2, "min_length": 3},
        {"use_cache": False, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_what_has_no_effect_is_said(settings):
    name = list(settings)[-1]
    with pytest.warns(UserWarning, match=name):
        GenerationConfig(**settings)
    with pytest.warns(UserWarning, match=name):
        GenerationConfig().updated(**settings)


def test_a_greedy_call_on_a_sampling_model_is_silent_and_none_means_default():
    model = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    greedy = model.updated(do_sample=False)
    assert greedy.temperature == 0.6
    unset = model.updated(do_sample=False, temperature=None, top_p=None, num_beams=None, top_k=None)
    assert (unset.temperature, unset.top_p, unset.num_beams, unset.top_k) == (1.0, 1.0, 1, 0)


def test_contrastive_search_reads_top_k_without_sampling():
    assert GenerationConfig(penalty_alpha=0.6, top_k=4).get_generation_mode() == "contrastive_search"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True},
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"penalty_alpha": 0.5, "top_k": 4},
        {"penalty_alpha": 0.5, "top_k": 1},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 4, "force_words_ids": [[3]]},
    ],
    ids=str,
)
def test_generation_mode_is_transformers(settings):
    assert quiet(**settings).get_generation_mode() == transformers.GenerationConfig(**settings).get_generation_mode()


def test_unknown_settings_are_refused_with_a_near_name():
    for make in (GenerationConfig, GenerationConfig().updated, lambda **k: GenerationConfig.from_dict({}, **k)):
        with pytest.raises(GenerationConfigError, match=r"'tempurature'.*'temperature'"):
            make(tempurature=1.0)
        with pytest.raises(GenerationConfigError, match=r"dola_layers.*DoLa"):
            make(dola_layers="high")
    with pytest.raises(GenerationConfigError, match=r"'bais'.*'bias'"):
        WatermarkingConfig.from_dict({"bais": 1.0})


def test_unknown_keys_of_a_file_are_kept(tmp_path):
    written = {"temperature": 0.5, "do_sample": True, "flux": [1, 2], "transformers_version": "9", "top_k": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.top_k == 50
    assert config.extra == {"flux": [1, 2], "transformers_version": "9"}
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == {
        k: v for k, v in written.items() if k != "top_k"
    }
    with pytest.warns(UserWarning, match="dola_layers"):
        GenerationConfig.from_dict({"dola_layers": "low"})


def test_unused_arguments_come_back_on_request():
    config, unused = GenerationConfig.from_dict({}, return_unused_kwargs=True, top_k=1, do_sample=True, foo=False)
    assert config.top_k == 1
    assert unused == {"foo": False}


def test_update_changes_all_or_nothing():
    config = GenerationConfig(max_new_tokens=4)
    with pytest.raises(GenerationConfigError):
        config.update(max_new_tokens=9, num_beams=0)
    assert config.max_new_tokens == 4
    assert config.update(max_new_tokens=9, foo=1) == {"foo": 1}
    assert config.max_new_tokens == 9


def test_eos_of_minus_one_means_none():
    assert GenerationConfig(eos_token_id=-1).eos_token_ids == ()
    assert GenerationConfig(eos_token_id=[1, -1]).eos_token_ids == (1,)


def test_live_objects_cannot_be_saved(tmp_path):
    config = quiet(constraints=[object()], num_beams=2)
    with pytest.raises(GenerationConfigError, match="cannot be written"):
        config.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
