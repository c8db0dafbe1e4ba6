"""The recipe of an accelerator: order, time, failures, and the same code on a CPU."""

import json

import pytest
from bench_tools import LIMITS, OURS, answer, spec_of

from gemmakit.bench.recipe import SMALL, Recipe, peak_flops
from gemmakit.bench.report import limit_share, plain_lines, prefill_share, recipe_table
from gemmakit.bench.rounds import SideFailed


def made(run=answer, **changes):
    fields = {"sizes": ("tiny",), "device": "cpu", "peers": False, "run_command": run, **changes}
    return Recipe(**fields)


def table(result):
    return "\n".join(plain_lines(recipe_table(result)))


def test_the_first_size_gets_everything_and_the_others_decoding():
    labels = [side.label for side in made(sizes=("2b", "7b")).sides()]
    assert labels[:2] == ["limits", "2b gemmakit plain generate"]
    assert {"2b gemmakit train", "2b gemmakit batch 64", "2b gemmakit batch 256", "quality int4"} <= set(labels)
    schemes = ("plain", "int8", "int4", "int4-g128")
    assert [x for x in labels if x.startswith("7b")] == [f"7b gemmakit {s} generate" for s in schemes]
    assert not any("transformers" in label for label in labels)


def test_peers_do_the_same_work():
    sides = {side.label: side.spec for side in made(peers=True).sides()}
    ours, eager = sides["tiny gemmakit plain generate"], sides["tiny transformers eager generate"]
    assert {**ours, "quantize": None} == {**eager, "quantize": None}
    assert sides["tiny transformers static generate"] == {**eager, "static": True}


def test_contexts_fit_the_model():
    for side in made(sizes=("2b",)).sides():
        if side.spec["part"] == "generate":
            longest = max(side.spec["contexts"]) + side.spec["new"] + 8
            assert longest <= side.spec["config"]["max_position_embeddings"]


def test_a_failing_part_costs_its_own_row_only(tmp_path):
    def failing(command, *_):
        if spec_of(command).get("quantize") == "int8":
            raise SideFailed("CUDA error: an illegal memory access was encountered")
        return answer(command)

    result = made(failing, save=tmp_path / "r.json").run()
    assert "illegal memory access" in result["parts"]["tiny gemmakit int8 generate"]["error"]
    assert result["parts"]["tiny gemmakit int4 generate"]["decode_tokens_per_s"] == 4.0
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert "illegal memory access" in table(result)


def test_no_part_begins_without_time_and_each_is_told_what_is_left(monkeypatch):
    given, now = [], 0.0
    monkeypatch.setattr("gemmakit.bench.recipe.time.monotonic", lambda: now)

    def slow(command, left_s):
        nonlocal now
        given.append(left_s)
        now += 100
        return answer(command)

    result = made(slow, budget_s=210.0).run()
    assert given == [210.0, 110.0]
    left_out = [p for p in result["parts"].values() if "not begun" in p.get("error", "")]
    assert len(left_out) == len(result["parts"]) - 1


def test_every_part_is_on_disk_before_the_next_begins(tmp_path):
    path, seen = tmp_path / "r.json", []

    def look(command, _):
        seen.append(len(json.loads(path.read_text())["parts"]) if path.exists() else None)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return answer(command)

    result = made(look, save=path).run()
    assert seen == [None, 0, 1, 1]  # limits and quality are kept beside the parts
    assert result["interrupted"] and json.loads(path.read_text()) == result
    assert "Interrupted" in table(result)


def test_shares_are_of_the_limits_of_the_same_run():
    assert limit_share(OURS, LIMITS) == 2.0 * 4.0 / 10.0
    assert limit_share({"batch_bytes_a_step": 4e9, "batch_tokens_per_s": 80.0, "rows": 64}, LIMITS) == 4 * 80 / 64 / 10
    assert limit_share({"train_flops_a_token": 1e9, "train_tokens_per_s": 30.0}, LIMITS) == 30 / 50
    assert prefill_share(OURS, LIMITS) == 4.0 * 20.0 / 50.0  # of its own dtype, bfloat16
    assert limit_share(OURS, {}) is None


def test_a_missing_peer_is_said(monkeypatch):
    monkeypatch.setattr("gemmakit.bench.recipe.find_spec", lambda name: None)
    result = made(peers=True).run()
    assert "No peer: transformers is not installed." in table(result)


def test_the_more_exact_name_of_a_device_wins():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("AMD EPYC") is None


@pytest.mark.slow
def test_the_recipe_runs_where_there_is_no_accelerator(tmp_path):
    """The code that runs on one, at a size that a CPU does in a minute."""
    result = Recipe(sizes=("tiny",), device="cpu", dtype="float32", scale=SMALL, peers=False).run()
    # A difference of such short runs may drown in noise, and then says so; nothing else may go wrong.
    wrong = [
        p["error"] for p in result["parts"].values() if "too small to time" not in p.get("error", "too small to time")
    ]
    assert not wrong
    assert len(result["parts"]) == 7
    assert {"int8", "int4", "int4-g128"} == set(result["quality"])
