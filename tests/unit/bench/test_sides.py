"""The method that all sides share: same prompt, same counts, choosing tokens included."""

import importlib.util
import json
import logging
import sys
import warnings

import pytest

import gemmakit
from gemmakit.bench.rounds import SIDES, Side, run_command


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("common", SIDES / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Machine:
    """A clock of its own: reading a token takes 1 s, making one 2 s, after a context 4 s."""

    def __init__(self, common, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(common.time, "perf_counter", lambda: self.now)

    def run(self, context, new, streamer):
        if streamer is not None:
            streamer.put("the prompt")
        self.now += 10 + context
        for i in range(new):
            self.now += (4 if context else 2) * (i > 0)
            if streamer is not None:
                streamer.put(i)


SPEC = {"prompt": 10, "new": 5, "contexts": [0, 100], "repeats": 3}


@pytest.mark.parametrize("stream", [True, False])
def test_rates_count_what_was_asked_for(common, monkeypatch, stream):
    found = common.rates(Machine(common, monkeypatch).run, {**SPEC, "stream": stream})
    assert found.pop("warm_up_s") > 0
    assert found == {
        "prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 0.5, "decode_tokens_per_s_after_100": 0.25,
        "decode_after_100_over_first": 0.5,
    }  # fmt: skip


def test_prefill_of_a_length_of_its_own(common, monkeypatch):
    found = common.rates(Machine(common, monkeypatch).run, {**SPEC, "prefill": 40, "stream": False})
    assert found["prefill_tokens_per_s"] == 40 / 50


def test_both_lengths_that_are_subtracted_are_replayed(common):
    """A shorter run of slow steps would make the rest look faster than it is."""
    from gemmakit.pytorch.decode.captured import WORTH_STEPS

    assert common.FEW >= WORTH_STEPS


def test_what_a_package_says_is_kept_once(common, monkeypatch):
    for name in ("some.package", "py.warnings"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    said = common.Said("some.package")
    try:
        for _ in range(2):
            logging.getLogger("some.package").debug("steps run %s", "one by one")
            warnings.warn("a kernel did not start", stacklevel=1)
    finally:
        logging.captureWarnings(False)
    first, second = said.lines
    assert first == "steps run one by one" and "did not start" in second


def test_nothing_is_quoted_where_the_noise_is_larger_than_the_work(common):
    with pytest.raises(SystemExit, match="too small to time"):
        common.above_zero(0.0)


def test_prompts_are_the_same_everywhere_and_no_special_tokens_but_bos(common):
    ids = common.prompt_ids(64, 2048)
    assert ids == common.prompt_ids(64, 2048)
    assert ids[0] == 2 and len(ids) == 64 and min(ids[1:]) >= 5 and max(ids) < 2048
    assert ids != common.prompt_ids(64, 2048, seed=1)


def test_a_result_is_one_line_of_json_with_numbers_to_five_digits(common, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["side", json.dumps({"part": "train"})])
    common.main({"train": lambda spec: {"x": 1 / 3, "n": 7}})
    assert json.loads(capsys.readouterr().out) == {"x": 0.33333, "n": 7}


def measured(script, **spec):
    base = {"dtype": "float32", "device": "cpu", "threads": 1, "repeats": 1, "prompt": 8, "new": 3}
    base |= {"contexts": [0, 32], "fill": "random", "model": str(gemmakit.demo_model())}
    return run_command(Side("measured", script, {**base, **spec}).command)


RATES = {"prefill_tokens_per_s", "decode_tokens_per_s", "decode_tokens_per_s_after_32", "decode_after_32_over_first"}
TIMES = {"side", "import_s", "load_s", "first_token_s"}


def test_gemmakit_is_measured_with_what_it_has_to_read():
    found = measured("ours", quantize="int8")
    assert RATES | TIMES | {"decode_plan", "head_dtype", "peak_rss_gb"} <= set(found)
    assert found["head_dtype"] == "int8"
    read, token = found["weight_bytes"], found["kv_bytes_a_token"]
    # The middle one of three steps after 8 (or 32) tokens reads those, one more, and one that came before it.
    assert found["bytes_a_token"] == {"0": read + 10 * token, "32": read + 34 * token}


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["random", "prompt"])
def test_transformers_is_measured_alike(fill):
    found = measured("transformers_side", fill=fill)
    assert set(found) >= RATES | TIMES
