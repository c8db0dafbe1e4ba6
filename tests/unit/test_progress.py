"""The bar: on a terminal, after a moment, and never for work that is done by then."""

from __future__ import annotations

import sys

import pytest

from gemmakit import progress


class Bar:
    """Stands in for rich's."""

    def __init__(self):
        self.told, self.stopped = [], False

    def add_task(self, text, total):
        return total

    def update(self, task, completed, total, description):
        self.told.append((total, completed, description))

    def stop(self):
        self.stopped = True


@pytest.fixture
def made(monkeypatch):
    """The bars that were opened, on what looks like a terminal."""
    bars = []
    monkeypatch.setattr(progress, "_rich_bar", lambda unit: bars.append(Bar()) or bars[-1])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    return bars


def test_a_bar_comes_after_two_seconds_and_goes_with_the_work(made):
    now = [0.0]
    with progress.progress_bar("bytes", lambda: now[0]) as tell:
        tell(1, 10)
        assert made == []
        now[0] = 2.1
        tell(2, 10, "a.weight")
        tell(10, 10)
    assert made[0].told == [(10, 2, "a.weight"), (10, 10, "")]
    assert made[0].stopped


def test_no_bar_comes_for_what_is_done(made):
    ticks = iter((0.0, 5.0))
    with progress.progress_bar("bytes", lambda: next(ticks)) as tell:
        tell(10, 10)
    assert made == []


def test_there_is_nothing_to_tell_without_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress.progress_bar("items") as tell:
        assert tell is None
    monkeypatch.setattr(sys, "stderr", None)
    with progress.progress_bar("items") as tell:
        assert tell is None


@pytest.mark.parametrize(("texts", "seconds", "bars"), [("abcd", 1.5, 1), ("abcd", 0.0, 0), ("a", 5.0, 0)])
def test_results_pass_through_whether_a_bar_comes_or_not(made, texts, seconds, bars):
    ticks = iter(range(100))
    assert list(progress.with_progress(iter(texts), len(texts), lambda: next(ticks) * seconds)) == list(texts)
    assert len(made) == bars
    assert all(bar.stopped for bar in made)


@pytest.mark.parametrize("unit", ["items", "bytes", "parts"])
def test_the_real_bar_shows_on_stderr_alone(monkeypatch, capsys, unit):
    ticks = iter((0.0, 3.0, 3.0))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.progress_bar(unit, lambda: next(ticks)) as tell:
        tell(1, 2, "a.weight")
    said = capsys.readouterr()
    assert said.out == ""
    assert "a.weight" in said.err
