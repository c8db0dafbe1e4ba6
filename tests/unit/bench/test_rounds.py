"""Sides take turns, each in its own process; what is quoted is the median of the rounds' ratios."""

import statistics
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rounds import Rounds, Side, SideFailed, in_turn, interleave, run_command

A, B = (Side(label, "gemmakit_side", {}) for label in "AB")


def by_label(answers):
    """run() that gives each side its next answer."""
    left = {label: iter(values) for label, values in answers.items()}
    labels = iter([])

    def say(message):
        nonlocal labels
        labels = message.rpartition(" ")[2]

    def run(command):
        value = next(left[labels])
        if isinstance(value, BaseException):
            raise value
        return value

    return say, run


def test_sides_alternate_and_everything_is_kept_at_once():
    said, kept = [], []
    interleave([A, B], 2, say=said.append, keep=lambda r: kept.append(sum(map(len, r.rounds))), run=lambda c: {"x": 1})
    assert [s.rpartition(" ")[2] for s in said] == ["A", "B", "A", "B"]
    assert kept == [1, 2, 3, 4, 4]


rates = st.floats(0.1, 1e6)


@given(st.lists(st.tuples(rates, rates), min_size=1, max_size=7))
def test_a_ratio_is_the_median_of_the_rounds_ratios(pairs):
    done = Rounds([{"A": {"x": a}, "B": {"x": b}} for a, b in pairs])
    # Ratios are kept to four decimals.
    assert done.ratios("A", "B")["x"] == pytest.approx(statistics.median(a / b for a, b in pairs), abs=6e-5)
    assert done.medians("A")["x"] == statistics.median(a for a, _ in pairs)


def test_a_ratio_of_medians_would_be_another_number():
    done = Rounds([{"A": {"x": a}, "B": {"x": b}} for a, b in [(1, 1), (10, 5), (4, 8)]])
    assert done.ratios("A", "B")["x"] == 1.0 != statistics.median([1, 10, 4]) / statistics.median([1, 5, 8])


def test_a_round_without_one_of_the_sides_has_no_ratio():
    done = Rounds([{"A": {"x": 6.0}, "B": {"x": 2.0}}, {"A": {"x": 100.0}}])
    assert done.ratios("A", "B") == {"x": 3.0}
    assert done.ratios("A", "C") == {}


def test_a_side_that_fails_is_left_out_and_says_why():
    say, run = by_label({"A": [{"x": 1}, {"x": 3}], "B": [SideFailed("no such file")]})
    done = interleave([A, B], 2, say=say, run=run)
    assert done.failed == {"B": "no such file"}
    assert done.medians("A") == {"x": 2}
    assert not done.interrupted


def test_an_interrupted_run_keeps_what_there_is():
    say, run = by_label({"A": [{"x": 1}, {"x": 3}], "B": [{"x": 2}, KeyboardInterrupt()]})
    done = interleave([A, B], 3, say=say, run=run)
    assert done.interrupted
    assert done.rounds == [{"A": {"x": 1}, "B": {"x": 2}}, {"A": {"x": 3}}]


def python(code):
    return [sys.executable, "-c", code]


def test_the_last_line_is_the_result():
    assert run_command(python("print('noise'); print('{\"x\": 1}')")) == {"x": 1}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ValueError('no room')", "ValueError: no room"),
        ("import sys; sys.exit(3)", "ended with code 3"),
        ("print('text')", "printed no result"),
        ("import time; time.sleep(60)", "longer than"),
    ],
)
def test_a_process_without_a_result_says_why(code, said):
    with pytest.raises(SideFailed, match=said):
        run_command(python(code), timeout_s=20 if "sleep" not in code else 0.3)


TRACE = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
torch.AcceleratorError: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
"""


def test_the_line_that_says_why_is_told_and_the_rest_is_kept():
    command = [sys.executable, "-c", f"import sys; sys.stderr.write({TRACE!r}); sys.exit(1)"]
    with pytest.raises(SideFailed, match=r"^torch.AcceleratorError: CUDA error: an illegal memory access") as failed:
        run_command(command)
    assert failed.value.tail == TRACE


def test_what_a_side_said_before_its_time_was_up_is_kept():
    code = "import sys, time; print('compiling', file=sys.stderr, flush=True); time.sleep(60)"
    with pytest.raises(SideFailed, match="took longer than the 3 s") as failed:
        run_command([sys.executable, "-c", code], 3.0)
    assert failed.value.tail == "compiling\n"


@dataclass
class Timed:
    """A side that writes its label to `log` whenever it is run, three times in turn behind its warming up."""

    label: str
    log: str
    then: str = "print(json.dumps({'load_s': 1.5, **found}))"

    @property
    def command(self):
        return python(f"""
import json
from itertools import count
from gemmakit.bench import timing

timing.time.perf_counter = map(lambda n: n * n, count()).__next__  # each run takes longer than the one before

def run(context, new, streamer):
    with open({self.log!r}, "a") as log:
        log.write({self.label!r})
    for _ in range(new + 1):
        streamer.put(0)

found = timing.rates(run, timing.Work(prompt=4, new=1, repeats=3, in_turn=True))
{self.then}
""")


def test_the_timed_runs_of_processes_take_turns(tmp_path):
    log = tmp_path / "log"
    once = SimpleNamespace(label="limits", command=python("print('{\"x\": 1}')"))
    ill = Timed("C", str(log), "raise ValueError('no room')")
    done = in_turn([once, Timed("A", str(log)), ill, Timed("B", str(log))])
    # Each warms up before the next starts.
    assert log.read_text() == "ACB" + 3 * "ACB"
    assert [sorted(found) for found in done.rounds] == [["A", "B", "limits"], ["A", "B"], ["A", "B"]]
    assert done.rounds[0]["limits"] == {"x": 1} and done.failed == {"C": "ValueError: no room"}
    assert all(found["A"]["load_s"] == 1.5 for found in done.rounds)
    rates = [found["A"]["prefill_tokens_per_s"] for found in done.rounds]
    assert len(set(rates)) > 1  # of each run, not their median
    assert done.medians("A")["prefill_tokens_per_s"] == statistics.median(rates)


def test_an_interrupted_turn_ends_the_processes(tmp_path):
    log = tmp_path / "log"

    def say(message):
        if message == "round 1 is done":
            raise KeyboardInterrupt

    done = in_turn([Timed("A", str(log))], say=say)
    assert done.interrupted and not done.rounds
    assert log.read_text() == "AA"  # the warm-up and one of three rounds
