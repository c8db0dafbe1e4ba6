"""The recipe of an accelerator: order, time, failures, and the same code on a CPU."""

import json

import pytest
from bench_tools import LIMITS, OURS, answer, spec_of
from gpu import OURS_S, PEER_S, SMALL, Recipe, main
from report import limit_share, peak_flops, plain_lines, prefill_share, recipe_table
from rounds import SideFailed


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
    assert labels[1:5] == [f"2b gemmakit {s} generate" for s in schemes]
    assert [x for x in labels if x.startswith("7b")] == [f"7b gemmakit {s} generate" for s in schemes]
    assert not any("transformers" in label for label in labels)


def test_peers_do_the_same_work():
    sides = {side.label: side.spec for side in made(peers=True).sides()}
    ours, eager = sides["tiny gemmakit plain generate"], sides["tiny transformers eager generate"]
    assert {**ours, "quantize": None, "check": None} == {**eager, "quantize": None, "check": None}
    static = {**eager, "static": True, "prefill": None}
    context = eager["contexts"][1]
    assert sides["tiny transformers static generate"] == {**static, "contexts": [0]}
    assert sides[f"tiny transformers static generate after {context}"] == {**static, "contexts": [context]}


def test_peers_come_behind_what_they_are_peers_of():
    labels = [side.label for side in made(sizes=("2b", "7b"), peers=True).sides()]
    peers = [i for i, label in enumerate(labels) if "transformers" in label]
    assert all(" gemmakit " in label or label.startswith(("limits", "quality")) for label in labels[: peers[0]])
    assert peers == list(range(peers[0], peers[0] + len(peers)))
    assert all(label.startswith("7b gemmakit") for label in labels[peers[-1] + 1 :])


def test_contexts_fit_the_model():
    for side in made(sizes=("2b",)).sides():
        if side.spec["part"] == "generate":
            longest = max(side.spec["contexts"]) + side.spec["new"] + 16  # FEW of timing.py
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
    monkeypatch.setattr("gpu.time.monotonic", lambda: now)

    def slow(command, left_s):
        nonlocal now
        given.append(left_s)
        now += 100
        return answer(command)

    result = made(slow, budget_s=210.0).run()
    assert given == [OURS_S, 110.0]
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
    assert seen == [None, 0, 1, 2]  # the limits are kept beside the parts
    assert result["interrupted"] and json.loads(path.read_text()) == result
    assert "Interrupted" in table(result)


def test_no_part_takes_the_time_of_the_others(monkeypatch):
    """A peer's compiler may take minutes, a device may hang."""
    monkeypatch.setattr("gpu.find_spec", lambda name: name)
    given = {}
    made(lambda command, left_s: given.setdefault(command[1], left_s) and answer(command), peers=True).run()
    assert sorted((path.rpartition("/")[2], left) for path, left in given.items()) == [
        ("gemmakit_side.py", OURS_S), ("transformers_side.py", PEER_S),
    ]  # fmt: skip
    assert max(OURS_S, PEER_S) < Recipe.budget_s / 3


def test_the_end_of_what_a_failing_part_said_is_kept():
    def failing(command, *_):
        raise SideFailed("torch.AcceleratorError: CUDA error", "Traceback ...")

    (part, *_) = made(failing).run()["parts"].values()
    assert part["stderr"] == "Traceback ..."


AGREES = {"tokens": 8, "replayed_same": 8, "same": 8, "logits_off": 0.01, "wrong": False}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "8 of 8 tokens as plain torch has them; logits differ by at most 1.0%"),
        (
            {"same": 3, "near_tie": True, "margin": 0.01},
            "3 of 8 tokens as plain torch has them, then a near tie (margin",
        ),
        ({"same": 3, "near_tie": False, "margin": 2.0}, "then ANOTHER ONE, and no near tie"),
        ({"logits_off": 3.0, "wrong": True}, "WRONG, 8 of 8"),
    ],
)
def test_the_table_says_whether_the_tokens_are_those_of_plain_torch(changes, said):
    def run(command, *_):
        return {**answer(command), "agreement": {**AGREES, **changes}}

    assert said in table(made(run).run())


def test_the_table_says_what_did_not_go_the_fast_way():
    def run(command, *_):
        return {
            **answer(command),
            "graphs": 0,
            "replayed_passes": 0,
            "said": ["its kernels are not used: why", "fewer than 8"],
        }

    said = table(made(run, device="cuda").run())
    assert "tiny gemmakit plain generate: no step was replayed." in said
    assert "tiny gemmakit batch 64: no step was replayed." in said
    assert "said: its kernels are not used: why" in said and "fewer than" not in said


def test_shares_are_of_the_limits_of_the_same_run():
    assert limit_share(OURS, LIMITS) == 2.0 * 4.0 / 10.0
    assert limit_share({"batch_bytes_a_step": 4e9, "batch_tokens_per_s": 80.0, "rows": 64}, LIMITS) == 4 * 80 / 64 / 10
    assert limit_share({"train_flops_a_token": 1e9, "train_tokens_per_s": 30.0}, LIMITS) == 30 / 50
    assert prefill_share(OURS, LIMITS) == 4.0 * 20.0 / 50.0  # of its own dtype, bfloat16
    assert limit_share(OURS, {}) is None


def test_a_missing_peer_is_said(monkeypatch):
    monkeypatch.setattr("gpu.find_spec", lambda name: None)
    result = made(peers=True).run()
    assert "No peer: transformers is not installed." in table(result)


def test_the_more_exact_name_of_a_device_wins():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("AMD EPYC") is None


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--device", "cpu", "--size", "9b"], "no size '9b'"), ([], "no CUDA device")]
)
def test_what_the_recipe_cannot_measure_is_refused(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe_runs_where_there_is_no_accelerator(tmp_path):
    """The code that runs on one, at a size that a CPU does in a minute."""
    result = Recipe(sizes=("tiny",), device="cpu", dtype="float32", scale=SMALL, peers=False).run()
    # A difference of such short runs may drown in noise, and then says so; nothing else may go wrong.
    wrong = [
        p["error"] for p in result["parts"].values() if "too small to time" not in p.get("error", "too small to time")
    ]
    assert not wrong
    assert len(result["parts"]) == 8
    checked = [part["agreement"] for part in result["parts"].values() if "agreement" in part]
    assert [found["same"] for found in checked] == [SMALL.check] * len(checked)
    assert {"int8", "int4", "int4-g128"} == set(result["quality"])
