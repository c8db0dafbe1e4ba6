"""A comparison: what it keeps, what it says, and what it does when something goes wrong."""

import json

import pytest
from bench_tools import LIMITS, OURS, QUALITY, answer, spec_of
from compare import PEERS, Comparison, best_limits, llamacpp_side, main, transformers_side
from report import comparison_table, plain_lines
from rounds import Rounds, Side, SideFailed, interleave

from gemmakit.bench.measure import shares
from gemmakit.errors import InputError


def comparison(run=answer, **changes):
    made = Comparison(model="folder", name="a model", threads=1, contexts=(0, 4096), run_command=run, **changes)
    made.peers = [transformers_side(made.spec, "bfloat16"), llamacpp_side(made.spec, "w.Q4_0.gguf", "python")]
    return made


def test_the_json_has_what_a_number_is_worth_nothing_without(tmp_path):
    result = comparison(save=tmp_path / "r.json", quantize="int4").run()
    assert json.loads((tmp_path / "r.json").read_text()) == result
    needed = {"date", "machine", "threads", "versions", "settings", "limits", "sides", "shares", "ratios", "quality"}
    assert needed <= set(result)
    assert result["quality"] == {"int4": QUALITY}
    assert list(result["sides"]) == ["gemmakit int4", "transformers bf16", "llama.cpp w.Q4_0"]
    assert result["ratios"]["transformers bf16"] == {
        "first_token_s": 0.5, "prefill_tokens_per_s": 2.0, "decode_tokens_per_s": 2.0,
    }  # fmt: skip
    assert len(result["rounds"]) == 3


def test_a_share_is_bytes_times_rate_over_bandwidth():
    found = shares(OURS, LIMITS)
    assert found["decode_of_bandwidth"] == {"0": 2.0 * 4.0 / 10.0, "4096": 2.5 * 3.0 / 10.0}
    assert found["prefill_of_matmul"] == 4.0 * 20.0 / 100.0  # of the faster dtype
    assert found["matmul_dtype"] == "float32"


def test_the_limit_is_the_best_that_any_round_saw():
    slow = {**LIMITS, "bandwidth_gb_per_s": 5.0, "matmul_gflop_per_s": {"float32": 200.0, "bfloat16": 1.0}}
    found = best_limits(Rounds([{"limits": slow}, {"limits again": LIMITS}]))
    assert found["bandwidth_gb_per_s"] == 10.0
    assert found["matmul_gflop_per_s"] == {"float32": 200.0, "bfloat16": 50.0}


def test_a_share_that_cannot_be_is_said():
    def idle_later(command, *_):
        slow = {**LIMITS, "bandwidth_gb_per_s": 5.0}
        return slow if spec_of(command).get("part") == "limits" else answer(command)

    said = "\n".join(plain_lines(comparison_table(comparison(idle_later).run())))
    assert "A share above 100 % cannot be" in said
    assert "A share above" not in "\n".join(plain_lines(comparison_table(comparison().run())))


def test_every_side_is_told_the_same():
    made = comparison(prompt=9, new=7)
    told = ("threads", "prompt", "new", "contexts", "repeats")
    assert all({k: side.spec[k] for k in told} == {k: made.spec[k] for k in told} for side in made.peers)


def test_a_quantized_peer_of_our_own_gets_its_quality_measured_too():
    made = comparison()
    made.peers = [Side("gemmakit int8", "gemmakit_side", {**made.spec, "quantize": "int8"})]
    assert list(made.run()["quality"]) == ["int8"]


def test_a_quantized_speed_without_quality_is_called_void():
    def no_quality(command, *_):
        if spec_of(command).get("part") == "quality":
            raise SideFailed("no demo model")
        return answer(command)

    said = "\n".join(plain_lines(comparison_table(comparison(no_quality, quantize="int8").run())))
    assert "No quality of int8 was measured (no demo model): without it these speeds say nothing." in said


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_comparison_keeps_its_results(tmp_path, after):
    count = 0

    def interrupted(command, *_):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return answer(command)

    result = comparison(interrupted, save=tmp_path / "r.json").run()
    assert result["interrupted"]
    assert sum(map(len, result["rounds"])) == after
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert "Interrupted" in "\n".join(plain_lines(comparison_table(result)))


def test_the_table_names_the_head_the_limit_and_the_ratios():
    said = "\n".join(plain_lines(comparison_table(comparison().run())))
    for part in ("80% bandwidth", "75% bandwidth", "80% matmul", "the head, in bfloat16, is 1 GB", "10 GB/s read",
                 "decode 2.00x", "-25.0%"):  # fmt: skip
        assert part in said


@pytest.mark.parametrize("wrong", [{"prompt": 0}, {"new": 0}, {"rounds": 0}, {"threads": 0}, {"contexts": (-1,)}])
def test_sizes_that_measure_nothing_are_refused(wrong):
    with pytest.raises(InputError, match=r"\w+ (is|are) .*at least"):
        Comparison(**{"model": "m", "name": "m", "threads": 1, **wrong})


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gguf", "no-such.gguf"], "there is no such file"),
        (["--quantize", "int3"], "there is no quantization 'int3'"),
        (["--size", "9b"], "there is no size '9b'"),
        (["--rounds", "0"], "rounds is 0"),
        (["folder", "--size", "tiny"], "give one of them"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr("rounds.subprocess.Popen", pytest.fail)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("peer", PEERS)
def test_an_absent_peer_names_the_command_that_installs_it(peer, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GEMMAKIT_PEERS", str(tmp_path))
    monkeypatch.setattr("peers.find_spec", lambda name: None)
    monkeypatch.setattr("rounds.subprocess.Popen", pytest.fail)
    assert main(["--peer", peer]) == 2
    assert f"make peers PEERS={peer}" in capsys.readouterr().err


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != "transformers"])
@pytest.mark.parametrize(
    ("arguments", "said"), [(["google/gemma-2b"], "a folder with config.json"), (["--device", "cuda"], "CPU only")]
)
def test_what_a_peer_cannot_read_is_refused_before_anything_runs(peer, arguments, said, capsys, monkeypatch):
    monkeypatch.setattr("compare.interpreter", lambda name: "python")
    monkeypatch.setattr("rounds.subprocess.Popen", pytest.fail)
    assert main(["--peer", peer, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_side_that_fails_is_said_and_is_an_error(capsys, monkeypatch):
    def failing(command, *_):
        if spec_of(command).get("part", "generate") == "generate":
            raise SideFailed("no such folder")
        return answer(command)

    monkeypatch.setattr("compare.interleave", lambda *given, **named: interleave(*given, **{**named, "run": failing}))
    assert main(["folder", "--rounds", "1"]) == 1
    assert "gemmakit failed: no such folder" in capsys.readouterr().out


@pytest.mark.slow
def test_transformers_is_compared_on_the_demo_model(capsys):
    quick = ("--quick", "--rounds", "1", "--repeats", "1", "--threads", "1", "--new", "4", "--prompt", "8")
    assert main([*quick, "--peer", "transformers"]) == 0
    assert "gemmakit / transformers, median of the rounds' ratios: decode" in capsys.readouterr().out
