"""gemmakit bench: the real measurement, as small as can be; no test looks at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
from cli_process import command_line, environment

from gemmakit.cli import main

QUICK = ("--quick", "--rounds", "1", "--repeats", "1", "--threads", "1", "--new", "4", "--prompt", "8")


def test_bench_prints_a_table_and_writes_json(gemmakit, tmp_path):
    path = tmp_path / "r.json"
    done = gemmakit("bench", *QUICK, "--context", "0,32", "--quantize", "int8", "--json", path)
    assert done.returncode == 0, done.stderr
    for said in ("decode after 32 tokens", "% bandwidth", "% matmul", "Quality of int8", "the head, in int8"):
        assert said in done.stdout
    assert "gemmakit: round 1 of 1: limits" in done.stderr
    result = json.loads(path.read_text())
    side = result["sides"]["gemmakit int8"]
    assert side["decode_tokens_per_s"] > 0 and side["decode_plan"]
    assert set(result["shares"]["decode_of_bandwidth"]) == {"0", "32"}
    assert {"gemmakit", "torch", "python"} <= set(result["versions"])


@pytest.mark.slow
def test_bench_measures_transformers_beside(gemmakit):
    done = gemmakit("bench", *QUICK, "--peer", "transformers")
    assert done.returncode == 0, done.stderr
    assert "gemmakit / transformers, median of the rounds' ratios: decode" in done.stdout


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    path = tmp_path / "r.json"
    command = command_line("bench", *QUICK, "--rounds", "50", "--json", path)
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(), start_new_session=True
    )
    end = time.monotonic() + 100
    while not (path.exists() and json.loads(path.read_text())["sides"]) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    result = json.loads(path.read_text())
    assert result["interrupted"] and result["sides"]
    assert "Interrupted: this is what was measured until then." in out


def test_a_side_that_fails_is_said_and_is_an_error(tmp_path, capsys):
    assert main(["bench", str(tmp_path), *QUICK]) == 1
    assert "gemmakit failed:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peer", "vllm"], "--peer is 'vllm'; it must be transformers or llama.cpp"),
        (["--peer", "llama.cpp"], "--gguf"),
        (["--gguf", "no-such.gguf"], "there is no such file"),
        (["--quantize", "int3"], "there is no quantization 'int3'"),
        (["--size", "9b"], "there is no size '9b'"),
        (["--context", "a"], "--context is 'a'"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["folder", "--size", "tiny"], "give one of them"),
        (["--json", "no/such/folder/r.json"], "there is no folder"),
        (["--recipe", "--quantize", "int8"], "it takes no --quantize"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr("gemmakit.bench.rounds.subprocess.Popen", pytest.fail)
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_absent_peer_names_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["bench", "--peer", "transformers"]) == 2
    assert "pip install transformers" in capsys.readouterr().err


def test_cuda_without_a_device_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
