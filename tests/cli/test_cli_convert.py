"""gemmakit convert: the documents' spelling and the short one, errors, a bar on a terminal and silence in a pipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import gemmakit
from gemmakit.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "conversion"))

from conversion_tools import assert_same_bits, listing, make, state_of, write_google


@pytest.fixture
def google(tmp_path: Path, tiny: Path) -> Path:
    """Google's folder: a .ckpt and a tokenizer.model."""
    model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
    path = write_google(model, tmp_path / "google")
    (path.parent / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
    return path


@pytest.mark.parametrize("spell", [lambda option: option, lambda option: option.replace("_", "-")])
def test_the_documented_options_convert_googles_checkpoint(google, tiny, tmp_path, capsys, spell):
    options = ["--input_checkpoint", str(google), "--output_dir", str(tmp_path / "out"), "--dtype", "bfloat16"]
    options += ["--tokenizer_checkpoint", str(tiny / "tokenizer.model"), "--convert_tokenizer"]
    options = [spell(option) if option.startswith("--") else option for option in options]
    assert main(["convert", *options]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out'}: {(tmp_path / 'out' / 'model.safetensors').stat().st_size / 1e3:.1f} kB\n"
    assert err == ""
    rounded = {name: tensor.bfloat16() for name, tensor in state_of(tiny).items()}
    assert_same_bits(state_of(tmp_path / "out"), rounded)
    text = "def add(a, b):"
    again = gemmakit.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(text)["input_ids"] == gemmakit.AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]


def test_a_folder_given_by_the_documented_option_is_read_for_its_ckpt(google, tiny, tmp_path):
    arguments = ["convert", "--input_checkpoint", str(google.parent), "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert_same_bits(state_of(tmp_path / "out"), state_of(tiny))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert main(["convert", str(google.parent), str(tmp_path / "other")]) == 2


def test_tokenizer_only_writes_the_tokenizer_alone(google, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["convert", "--model_size", "tokenizer_only", "--tokenizer_checkpoint"]
    arguments += [str(google.with_name("tokenizer.model")), "--output_dir", str(out)]
    assert main(arguments) == 0
    assert "tokenizer.json" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    assert main(arguments) == 0, "the same again changes nothing"
    (out / "tokenizer.json").write_text("{}")
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize("to", ["safetensors", "msgpack", "gguf"])
def test_the_short_form_converts_to_each_kind_and_back(tiny, tmp_path, to):
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    assert main(["convert", str(tiny), str(out), "--to", to]) == 0
    assert main(["convert", str(out), str(tmp_path / "back"), "--max-shard-size", "60KB"]) == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same_bits(state_of(tmp_path / "back"), state_of(tiny))
    found = main(["doctor", str(out)])
    assert found == 0


def test_a_type_makes_a_gguf_file_of_it(tiny, tmp_path, capsys):
    assert main(["convert", str(tiny), str(tmp_path / "a.gguf"), "--type", "q8_0"]) == 0
    capsys.readouterr()
    assert main(["doctor", str(tmp_path / "a.gguf"), "--json"]) == 0
    assert "Q8_0" in json.loads(capsys.readouterr().out)["dtypes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{in}"], "say where to write"),
        (["--output_dir", "{out}"], "say what to convert"),
        (["{in}", "{out}", "--output_dir", "x"], "give one of them"),
        (["{in}", "{out}", "--model_size", "9B"], "2B, 7B, tokenizer_only"),
        (["{in}", "{out}", "--model_size", "7B"], "a 7B model has"),
        (["{in}", "{out}", "--dtype", "int8"], "dtype is 'int8'"),
        (["{in}", "{out}", "--to", "onnx"], "safetensors, msgpack, gguf"),
        (["{in}", "{out}", "--max-shard-size", "much"], "A size must be"),
        (["{in}", "{out}.gguf", "--type", "Q3"], "type is 'Q3'"),
        (["{in}", "{in}"], "--overwrite"),
        (["./nothing", "{out}"], "does not exist"),
        (["{in}", "{out}", "--tokenizer_checkpoint", "{empty}"], "neither tokenizer.model nor tokenizer.json"),
        (["{bare}", "{out}", "--convert_tokenizer"], "--tokenizer_checkpoint"),
        (["--model_size", "tokenizer_only", "--output_dir", "{out}"], "say where the tokenizer is"),
        (["--model_size", "tokenizer_only", "{empty}", "{out}"], "no tokenizer to convert"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2_and_writes_nothing(arguments, said, tiny, tmp_path, capsys):
    for name in ("empty", "bare"):
        (tmp_path / name).mkdir()
    make().save_pretrained(tmp_path / "bare")
    places = {"in": tiny, "out": tmp_path / "out", "empty": tmp_path / "empty", "bare": tmp_path / "bare"}
    before = listing(tiny)
    assert main(["convert", *(a.format(**places) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gemmakit: ")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "out").exists()
    assert listing(tiny) == before


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


def test_a_pickle_that_carries_code_is_one_line_and_runs_nothing(tmp_path, monkeypatch, capsys):
    import pickle

    monkeypatch.chdir(tmp_path)
    Path("model.ckpt").write_bytes(pickle.dumps({"model_state_dict": Evil()}))
    assert main(["convert", "model.ckpt", "out"]) == 2
    assert main(["doctor", "model.ckpt"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "more than tensors" in err
    assert "more than tensors" in out
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt"}


def test_what_is_pushed_is_the_folder_under_the_name_of_the_documents(tiny, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "gemmakit.cli.convert.push_folder",
        lambda folder, repo_id, **more: seen.append((str(folder), repo_id, more)) or "address",
    )
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(tiny), "google/gemma-tiny", "--push_to_hub"]) == 0
    assert main(["convert", str(tiny), str(tmp_path / "b"), "--push-to-hub", "--repo-id", "me/mine"]) == 0
    assert main(["convert", str(tiny), str(tmp_path / "c"), "--push-to-hub"]) == 0
    assert [repo for _, repo, _ in seen] == ["google/gemma-tiny", "me/mine", "c"]
    assert all(more == {"private": True} for *_, more in seen)
    assert capsys.readouterr().out.count("address") == 3


def test_the_real_command_is_silent_in_a_pipe(gemmakit, tiny, tmp_path):
    done = gemmakit("convert", tiny, tmp_path / "out", "--dtype", "float16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert state_of(tmp_path / "out")["model.norm.weight"].dtype == torch.float16
