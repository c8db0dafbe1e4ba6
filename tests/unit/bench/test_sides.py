"""The method that all sides share: same prompt, same counts, choosing tokens included."""

import json
import logging
import sys
import warnings
from dataclasses import replace

import pytest
import rows
from rounds import SIDES, Rounds, Side, run_command

import gemmakit
from gemmakit.bench import timing
from gemmakit.errors import InputError
from gemmakit.pytorch.decode import invariance
from gemmakit.pytorch.kernels import cpu

sys.path.insert(0, str(SIDES))
import side


class Machine:
    """A clock of its own: reading a token takes 1 s, making one 2 s, after a context 4 s."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def run(self, context, new, streamer):
        if streamer is not None:
            streamer.put("the prompt")
        self.now += 10 + context
        for i in range(new):
            self.now += (4 if context else 2) * (i > 0)
            if streamer is not None:
                streamer.put(i)


WORK = timing.Work(prompt=10, new=5, contexts=(0, 100), repeats=3)


@pytest.mark.parametrize("stream", [True, False])
def test_rates_count_what_was_asked_for(monkeypatch, stream):
    found = timing.rates(Machine(monkeypatch).run, replace(WORK, stream=stream))
    assert found.pop("warm_up_s") > 0
    assert found == {
        "prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 0.5, "decode_tokens_per_s_after_100": 0.25,
        "decode_after_100_over_first": 0.5,
    }  # fmt: skip


def test_prefill_of_a_length_of_its_own(monkeypatch):
    found = timing.rates(Machine(monkeypatch).run, replace(WORK, prefill=40, stream=False))
    assert found["prefill_tokens_per_s"] == 40 / 50


def test_both_lengths_that_are_subtracted_are_replayed():
    """A shorter run of slow steps would make the rest look faster than it is."""
    from gemmakit.pytorch.decode.capture import WORTH_STEPS

    assert timing.FEW >= WORTH_STEPS


def test_what_a_package_says_is_kept_once(monkeypatch):
    for name in ("some.package", "py.warnings"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    said = side.Said("some.package")
    try:
        for _ in range(2):
            logging.getLogger("some.package").debug("steps run %s", "one by one")
            warnings.warn("a kernel did not start", stacklevel=1)
    finally:
        logging.captureWarnings(False)
    first, second = said.lines
    assert first == "steps run one by one" and "did not start" in second


def test_nothing_is_quoted_where_the_noise_is_larger_than_the_work():
    with pytest.raises(InputError, match="too small to time"):
        timing.above_zero(0.0)


def test_prompts_are_the_same_everywhere_and_no_special_tokens_but_bos():
    ids = timing.prompt_ids(64, 2048)
    assert ids == timing.prompt_ids(64, 2048)
    assert ids[0] == 2 and len(ids) == 64 and min(ids[1:]) >= 5 and max(ids) < 2048
    assert ids != timing.prompt_ids(64, 2048, seed=1)


def test_a_result_is_one_line_of_json_with_numbers_to_five_digits(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["side", json.dumps({"part": "train"})])
    side.main({"train": lambda spec: {"x": 1 / 3, "n": 7}})
    assert json.loads(capsys.readouterr().out) == {"x": 0.33333, "n": 7}


def measured(script, **spec):
    base = {"dtype": "float32", "device": "cpu", "threads": 1, "repeats": 1, "prompt": 8, "new": 3}
    base |= {"contexts": [0, 32], "fill": "random", "model": str(gemmakit.demo_model())}
    return run_command(Side("measured", script, {**base, **spec}).command)


RATES = {"prefill_tokens_per_s", "decode_tokens_per_s", "decode_tokens_per_s_after_32", "decode_after_32_over_first"}
TIMES = {"side", "import_s", "load_s", "first_token_s"}


def test_gemmakit_is_measured_with_what_it_has_to_read():
    found = measured("gemmakit_side", quantize="int8")
    assert RATES | TIMES | {"decode_plan", "head_dtype", "peak_rss_gb"} <= set(found)
    assert found["head_dtype"] == "int8"
    read, token = found["weight_bytes"], found["kv_bytes_a_token"]
    # The middle one of three steps after 8 (or 32) tokens reads those, one more, and one that came before it.
    assert found["bytes_a_token"] == {"0": read + 10 * token, "32": read + 34 * token}


def test_rows_side_by_side_are_measured_with_what_was_decided():
    found = measured("gemmakit_side", part="rows", rows=[1, 2], new=4)
    assert {"tokens_per_s_1", "tokens_per_s_2"} <= set(found)
    assert found["batch_invariant"].startswith(invariance.HELD if cpu.library() else invariance.NOT_HELD)


def test_a_step_of_more_rows_is_told_beside_one_of_one():
    found = Rounds([{"a": {"tokens_per_s_1": 10.0, "tokens_per_s_8": 64.0}, "b": {"tokens_per_s_8": 32.0}}])
    told = rows.summary(found, [1, 8])
    assert told["a"] == {"tokens_per_s": {1: 10.0, 8: 64.0}, "step_over_one_row": {1: 1.0, 8: 1.25}}
    assert told["b"]["ours_over_theirs"] == {8: 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["random", "prompt"])
def test_transformers_is_measured_alike(fill):
    found = measured("transformers_side", fill=fill)
    assert set(found) >= RATES | TIMES
