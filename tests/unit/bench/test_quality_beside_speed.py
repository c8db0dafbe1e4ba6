"""Quality is measured on the device whose speed it is for, or, where that fails, on the CPU, and that is said."""

import pytest
from bench_tools import QUALITY, answer, spec_of
from gpu import Recipe
from report import plain_lines, recipe_table

from gemmakit.bench import measure


def test_a_device_that_fails_costs_the_place_not_the_number(monkeypatch):
    asked, measured = [], measure._quality

    def failing(scheme, threads, device, tokens):
        asked.append(device)
        if device != "cpu":
            raise RuntimeError("CUDA error: no kernel image")
        return measured(scheme, threads, device, tokens)

    monkeypatch.setattr(measure, "_quality", failing)
    found = measure.quality("int8", 1, device="cuda", tokens=64)
    assert asked == ["cuda", "cpu"]
    assert found["device"] == "cpu" and found["device_error"] == "RuntimeError: CUDA error: no kernel image"
    assert 0.9 < found["perplexity_ratio"] < 1.1


def test_a_cpu_that_fails_is_an_error(monkeypatch):
    def failing(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(measure, "_quality", failing)
    with pytest.raises(RuntimeError, match="no"):
        measure.quality("int8", 1)


def test_the_recipe_asks_for_its_device_and_says_when_it_failed():
    devices = []

    def run(command, *_):
        spec = spec_of(command)
        if spec["part"] != "quality":
            return answer(command)
        devices.append(spec["device"])
        return {**QUALITY, "device_error": "RuntimeError: CUDA error"}

    result = Recipe(sizes=("tiny",), device="cuda", peers=False, run_command=run).run()
    assert devices == ["cuda"] * 3
    said = " ".join(plain_lines(recipe_table(result)))
    assert "Quality of int8 was measured on the CPU, for the device failed: RuntimeError: CUDA error" in said
