"""gemmakit bench: the real measurement, as small as can be; no test looks at a time."""

from __future__ import annotations

import json
import os

import compare
import pytest

from gemmakit.bench import measure
from gemmakit.cli import bench, main

QUICK = ("--quick", "--repeats", "1", "--threads", "1", "--new", "4", "--prompt", "8")


def test_bench_prints_a_table_and_writes_json(gemmakit, tmp_path):
    path = tmp_path / "r.json"
    done = gemmakit("bench", *QUICK, "--context", "0,32", "--quantize", "int8", "--json", path)
    assert done.returncode == 0, done.stderr
    for said in ("decode after 32 tokens", "% bandwidth", "% matmul", "Quality of int8", "the head, in int8"):
        assert said in done.stdout
    assert "gemmakit: measuring the machine's limits" in done.stderr
    result = json.loads(path.read_text())
    assert result["speed"]["decode_tokens_per_s"] > 0 and result["speed"]["decode_plan"]
    assert result["quality"]["top1_agreement"] > 0.9
    assert set(result["shares"]["decode_of_bandwidth"]) == {"0", "32"}
    assert {"gemmakit", "torch", "python"} <= set(result["versions"])


def test_random_weights_in_a_shape_need_no_file(gemmakit):
    done = gemmakit("bench", *QUICK, "--size", "tiny")
    assert done.returncode == 0, done.stderr
    assert "Gemma TINY shape, random weights" in done.stdout


@pytest.fixture
def measured(monkeypatch):
    """In the place of what takes time."""
    speed = {"bytes_a_token": {"0": 10**9}, "head_dtype": "int8", "head_bytes": 10**8, "load_s": 0.1,
             "decode_tokens_per_s": 4.0, "prefill_tokens_per_s": 20.0, "prefill_flops_a_token": 4 * 10**9}  # fmt: skip
    limits = {"bandwidth_gb_per_s": 5.0, "bandwidth_by": "test", "matmul_gflop_per_s": {"float32": 100.0}}
    monkeypatch.setattr(measure, "speed", lambda *_, **__: speed)
    monkeypatch.setattr(measure, "limits", lambda *_, **__: limits)
    return limits


@pytest.mark.parametrize(("part", "kept"), [("speed", []), ("limits", ["speed"]), ("quality", ["speed", "limits"])])
def test_ctrl_c_keeps_what_was_measured(part, kept, measured, monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, part, interrupted)
    assert main(["bench", *QUICK, "--quantize", "int8", "--json", str(tmp_path / "r.json")]) == 130
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["interrupted"] and [name for name in ("speed", "limits", "quality") if result[name]] == kept
    assert "Interrupted: this is what was measured until then." in capsys.readouterr().out


def test_a_quantized_speed_without_quality_is_called_void(measured, monkeypatch, capsys):
    def failing(*_, **__):
        raise OSError("no demo model")

    monkeypatch.setattr(measure, "quality", failing)
    assert main(["bench", *QUICK, "--quantize", "int8"]) == 0
    assert "No quality of int8 was measured (OSError: no demo model)" in capsys.readouterr().out


def test_a_share_that_cannot_be_is_said(measured, capsys):
    assert main(["bench", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "80% bandwidth" in out and "80% matmul" in out and "A share above" not in out
    measured["bandwidth_gb_per_s"] = 2.0
    assert main(["bench", *QUICK]) == 0
    assert "A share above 100 % cannot be" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["bench", str(tmp_path), *QUICK]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantize", "int3"], "there is no quantization 'int3'"),
        (["--size", "9b"], "there is no size '9b'"),
        (["--context", "a"], "--context is 'a'"),
        (["--repeats", "0"], "repeats is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["folder", "--size", "tiny"], "give one of them"),
        (["--json", "no/such/folder/r.json"], "there is no folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(measure, "speed", pytest.fail)
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_cuda_without_a_device_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


# -- beside other programs ---------------------------------------------------------------------------------------------


def test_a_peer_is_handed_over_to_the_checkout_s_own_script(monkeypatch):
    """Every option that both have is told; Ctrl-C is the script's, which runs in this process's place."""
    told = []

    class Replaced(BaseException):
        pass

    def execv(_, command):
        told.extend(command)
        raise Replaced  # it does not come back

    monkeypatch.setattr("gemmakit.cli.bench.os.execv", execv)
    with pytest.raises(Replaced):
        main(["bench", *QUICK, "--peer", "openvino", "--peer", "llama.cpp", "--quantize", "int8", "a folder"])
    assert told[1].endswith(os.path.join("benchmarks", "compare.py"))
    args = compare.arguments().parse_args(told[2:])
    assert (args.model, args.peer, args.quantize, args.quick) == ("a folder", ["openvino", "llama.cpp"], "int8", True)
    assert (args.repeats, args.threads, args.new, args.prompt, args.rounds) == (1, 1, 4, 8, 1)


def test_the_peers_are_those_of_the_laboratory():
    assert set(bench.PEERS) == set(compare.PEERS)


def test_an_installation_without_the_laboratory_says_how_to_get_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "gemmakit" / "cli" / "bench.py"))
    assert main(["bench", *QUICK, "--peer", "openvino"]) == 2
    said = capsys.readouterr().err
    assert "measured from a checkout" in said and "make peers PEERS=" in said and "site-packages" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--peer", "mlx"], "openvino, onnxruntime"), (["--peer", "openvino", "--tensor", "2"], "--tensor")],
)
def test_peers_that_cannot_be_are_refused(arguments, said, capsys):
    assert main(["bench", *QUICK, *arguments]) == 2
    assert said in capsys.readouterr().err
