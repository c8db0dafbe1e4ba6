"""gemmakit quantize: a folder in, a smaller folder out that runs; every refusal is one line and writes nothing."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    "how", [("--int8",), ("--int6",), ("--int4", "--group-size", "128", "--head-bits", "none")], ids=str
)
def test_what_is_written_runs(gemmakit, tiny, tmp_path, how):
    out = tmp_path / "out"
    done = gemmakit("quantize", tiny, out, *how)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "MB of weights" in done.stdout
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["bits"] == int(how[0][-1]) and settings["calibration"] is None
    assert (out / "tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()
    said = gemmakit("run", "--model", out, "--greedy", "-n", "4", "a")
    assert said.returncode == 0, said.stderr
    assert (out / "model.safetensors").stat().st_size < (tiny / "model.safetensors").stat().st_size


def test_texts_for_calibration(gemmakit, tiny, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("def add(a, b):\n    return a + b\n" * 40)
    done = gemmakit("quantize", tiny, out, "--int4", "--calibrate", text)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "config.json").read_text())["quantization_config"]["calibration"] == "gptq"


def test_a_text_of_its_own_for_calibration(gemmakit, tiny, tmp_path):
    done = gemmakit("quantize", tiny, tmp_path / "out", "--int4", "--self-calibrate")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["calibration"] == "gptq"


def test_a_budget_is_what_the_file_takes(gemmakit, tiny, tmp_path):
    done = gemmakit("quantize", tiny, tmp_path / "out", "--bits", "6")
    assert done.returncode == 0, done.stderr
    said = gemmakit("doctor", tmp_path / "out")
    assert said.returncode == 0 and " modules" in said.stdout, said.stderr
    assert gemmakit("run", "--model", tmp_path / "out", "--greedy", "-n", "4", "a").returncode == 0


def test_refusals_are_one_line_and_write_nothing(gemmakit, tiny, tmp_path):
    out, empty = tmp_path / "out", tmp_path / "empty.txt"
    empty.write_text("")
    for arguments, message in [
        ((), "--int4, --int5, --int6, --int8 and --bits: give one of them"),
        (("--int4", "--int8"), "--int4, --int5, --int6, --int8 and --bits: give one of them"),
        (("--int4", "--bits", "5"), "--int4, --int5, --int6, --int8 and --bits: give one of them"),
        (("--bits", "3"), "bits is 3.0"),
        (("--bits", "5", "--head-bits", "8"), "--bits decides"),
        (("--int4", "--group-size", "64"), "group_size is 64"),
        (("--int8", "--head-bits", "16"), "--head-bits is '16'"),
        (("--int4", "--calibrate", tmp_path / "nowhere"), "cannot be read"),
        (("--int4", "--calibrate", empty), "holds no text"),
        (("--int4", "--calibrate", empty, "--self-calibrate"), "give one of them"),
        (("--int4", "--max-shard-size", "many"), "size"),
    ]:
        done = gemmakit("quantize", tiny, out, *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not out.exists() or not list(out.iterdir())


def test_a_folder_in_use_needs_overwrite(gemmakit, tiny, tmp_path):
    out = tmp_path / "out"
    assert gemmakit("quantize", tiny, out, "--int8").returncode == 0
    again = gemmakit("quantize", tiny, out, "--int4")
    assert again.returncode == 2 and "--overwrite" in again.stderr
    assert gemmakit("quantize", tiny, out, "--int4", "--overwrite").returncode == 0
    twice = gemmakit("quantize", out, tmp_path / "twice", "--int4")
    assert twice.returncode == 2 and "quantized by gemmakit already" in twice.stderr
