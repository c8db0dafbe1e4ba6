"""gemmakit doctor and env: what this machine can run, and whether a checkpoint is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import gemmakit
from gemmakit.checkpoint.inspect import inspect
from gemmakit.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "conversion"))

from conversion_tools import make, write_google, write_orbax

# -- the machine -------------------------------------------------------------------------------------------------------


def test_doctor_says_what_the_machine_can_run(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu"]["threads"] >= 1
    assert found["versions"]["gemmakit"] == gemmakit.__version__
    assert found["paths"]["attention"] == "sdpa"
    names = sorted(name for names in found["paths"]["cpu_step"].values() for name in names)
    assert names == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"])


def test_doctor_prints_a_page_that_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setattr("gemmakit.cli.doctor.cpu_name", lambda: "A CPU")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "float32" in out
    assert "int4 g32" in out
    assert "free" in out


def test_doctor_names_the_command_that_installs_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("gemmakit.cli.doctor.missing_extras", lambda: {"flax": ["jax", "flax"]})
    assert main(["doctor"]) == 0
    assert "  jax, flax   pip install 'gemmakit[flax]'\n" in capsys.readouterr().out


def test_one_thread_is_a_thread_and_the_documents_tools_are_nothing_to_miss(capsys, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setattr("gemmakit.cli.env.installed", lambda name: None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert " 1 thread on " in out
    assert "mkdocs" not in out
    assert "gemmakit[flax]" in out


def test_options_that_look_into_files_need_one(capsys):
    assert main(["doctor", "--deep"]) == 2
    assert "name one" in capsys.readouterr().err


def test_env_lists_versions(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"gemmakit", "python", "system", "torch", "tokenizers"} <= set(found)
    assert main(["env"]) == 0
    assert all(name in capsys.readouterr().out for name in ("torch",))


# -- a checkpoint ------------------------------------------------------------------------------------------------------


def examined(capsys, path, *options, code=None):
    """The JSON report; the exit code must say the same as its verdict."""
    found = main(["doctor", str(path), "--json", *options])
    report = json.loads(capsys.readouterr().out)
    assert found == (0 if report["whole"] else 2)
    if code is not None:
        assert found == code, report["problems"]
    return report


def lines(report):
    return [problem["line"] for problem in report["problems"]]


@pytest.mark.parametrize("kind", ["safetensors", "shards", "msgpack", "gguf", "google", "pickle", "orbax", "file"])
def test_a_whole_checkpoint_of_each_kind_is_known_and_found_whole(tiny, tmp_path, capsys, kind):
    model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
    path = tiny
    if kind == "shards":
        path = tmp_path / "out"
        gemmakit.convert_checkpoint(tiny, path, max_shard_size="60KB")
    elif kind in ("msgpack", "gguf"):
        path = tmp_path / ("out.gguf" if kind == "gguf" else "out")
        gemmakit.convert_checkpoint(tiny, path, to=kind)
    elif kind == "google":
        path = write_google(model, tmp_path)
    elif kind == "pickle":
        path = tmp_path / "weights.pt"
        torch.save({n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}, path)
        model.config.save_pretrained(tmp_path)
    elif kind == "orbax":
        path = write_orbax(model, tmp_path / "out")
    elif kind == "file":
        path = tiny / "model.safetensors"
    report = examined(capsys, path, "--deep", "--tensors", code=0)
    assert report["kind"] == {"shards": "safetensors", "file": "safetensors"}.get(kind, kind)
    assert report["architecture"] == "GemmaForCausalLM"
    assert report["parameters"] == model.num_parameters()
    assert set(report["dtypes"]) == ({"F32"} if kind == "gguf" else {"float32"})
    assert report["tensors"].keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert report["memory"]["float32"]["weights"] == 4 * model.num_parameters()
    config = model.config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 1000
    assert report["memory"]["bfloat16"]["kv_per_1000_tokens"] == 2 * kv
    assert report["memory"]["int4 g32"]["weights"] < report["memory"]["int8"]["weights"]
    if kind in ("safetensors", "shards", "msgpack", "gguf", "file"):
        assert report["tokenizer"]["loads"]
        assert report["tokenizer"]["size"] == 1024


def test_the_report_is_a_page_of_80_columns_plain_in_a_pipe(tiny, capsys):
    assert main(["doctor", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    assert "Whole" in out
    assert "int4 g128" in out
    assert main(["doctor", str(tiny), "--tensors"]) == 0
    assert "model.layers.1.mlp.down_proj.weight" in capsys.readouterr().out


def test_the_verdict_is_coloured_on_a_terminal(tiny, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["doctor", str(tiny)]) == 0
    assert "\x1b[32mWhole\x1b[0m" in capsys.readouterr().out


@pytest.fixture
def shards(tmp_path):
    """A checkpoint in several files, and its index."""
    folder = tmp_path / "in"
    make().save_pretrained(folder, max_shard_size="9KB")
    return folder, json.loads((folder / "model.safetensors.index.json").read_text())


def test_every_damaged_shard_is_named_in_one_report(shards, capsys):
    folder, index = shards
    first, second, third = sorted(set(index["weight_map"].values()))[:3]
    (folder / first).write_bytes((folder / first).read_bytes()[:-4])
    (folder / second).unlink()
    (folder / third).write_bytes(b"nonsense, but long enough to hold a length")
    report = examined(capsys, folder, code=2)
    assert len(report["problems"]) == 3, lines(report)
    assert "truncated" in next(line for line in lines(report) if first in line)
    count = sum(name == second for name in index["weight_map"].values())
    expected = f"{second}: expected a file with {count} tensors (model.safetensors.index.json names it), found none"
    assert expected in lines(report)
    assert any(third in line for line in lines(report))


def test_an_index_and_shards_that_disagree_are_named_tensor_by_tensor(shards, capsys):
    folder, index = shards
    name, other = "model.norm.weight", sorted(set(index["weight_map"].values()))[0]
    held = index["weight_map"][name]
    index["weight_map"][name] = other
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = lines(examined(capsys, folder, code=2))
    assert f"{other}: {name}: expected the tensor that model.safetensors.index.json places here, found nothing" in found
    assert (
        f"{held}: {name}: expected no such tensor (model.safetensors.index.json places it {other}), found one" in found
    )


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"num_hidden_layers": 3}, "in: model.layers.2.mlp.up_proj.weight: expected shape 64x40, found nothing"),
        ({"num_hidden_layers": 1}, "in: model.layers.1.mlp.up_proj.weight: expected no such tensor, found shape 64x40"),
        ({"intermediate_size": 80}, "in: model.layers.1.mlp.up_proj.weight: expected shape 80x40, found shape 64x40"),
    ],
)
def test_missing_left_over_and_misshapen_tensors_are_named(shards, capsys, values, line):
    folder, _ = shards
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    report = examined(capsys, folder, code=2)
    assert line in lines(report)
    assert len(report["problems"]) == {"num_hidden_layers": 9, "intermediate_size": 6}[next(iter(values))]


def test_nan_and_infinity_are_found_by_deep_alone(tmp_path, capsys):
    model = make(dtype="bfloat16")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
        model.model.layers[1].mlp.up_proj.weight[60, 0] = float("-inf")
    model.save_pretrained(tmp_path)
    examined(capsys, tmp_path, code=0)
    line = (
        "model.safetensors: model.layers.1.mlp.up_proj.weight: expected finite numbers, found 2 of 2560 NaN or infinite"
    )
    assert lines(examined(capsys, tmp_path, "--deep", code=2)) == [line]


def test_a_deep_look_tells_how_far_it_is(tmp_path, monkeypatch):
    make(dtype="bfloat16").save_pretrained(tmp_path)
    monkeypatch.setattr("gemmakit.checkpoint.inspect._SCAN_ELEMENTS", 1 << 10)
    told = []
    found = inspect(tmp_path, deep=True, progress=lambda done, total: told.append((done, total)))
    assert {total for _, total in told} == {found.tensor_bytes}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == found.tensor_bytes
    assert len(told) > 2 * len(found.tensors), "a large tensor is many steps"


def test_small_files_that_are_broken_are_problems_too(tiny, tmp_path, capsys):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff")
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": -1}')
    report = examined(capsys, tmp_path, code=2)
    assert [problem["file"] for problem in report["problems"]] == ["generation_config.json", "tokenizer"]
    assert report["tokenizer"]["loads"] is False
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in examined(capsys, tmp_path, code=2)["problems"][0]["line"]
    assert main(["doctor", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "Not whole: 3 problems" in out


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf", "x.msgpack", "x.ckpt", "x.bin", "x.txt"])
def test_a_file_that_is_none_of_what_its_name_says_is_a_problem(tmp_path, capsys, name):
    for content in (b"", b"\x80\x02nothing", bytes(range(256)) * 8):
        (tmp_path / name).write_bytes(content)
        report = examined(capsys, tmp_path / name, code=2)
        assert len(report["problems"]) == 1
        assert name in report["problems"][0]["line"]


def test_an_empty_folder_and_one_with_a_pickle_alone_are_not_found_whole(tmp_path, capsys):
    assert "model.safetensors" in lines(examined(capsys, tmp_path, code=2))[0]
    path = write_google(make(), tmp_path)
    assert "pickle" in lines(examined(capsys, tmp_path, code=2))[0]
    examined(capsys, tmp_path, "--allow-pickle", code=0)
    examined(capsys, path, code=0)


def test_quantized_weights_are_compared_as_the_matrices_they_stand_for(tmp_path, capsys):
    """gemmakit's int8: codes (O, I) beside scales (O, 1)."""
    from safetensors.torch import load_file, save_file

    make().save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    held |= {name: torch.zeros(64, 40, dtype=torch.int8), f"{name}_scale": torch.ones(64, 1)}
    path = tmp_path / "config.json"
    settings = {"quant_method": "gemmakit", "bits": 8, "head_bits": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = examined(capsys, tmp_path, "--deep", code=0)
    assert report["quantization"] == "gemmakit, bits 8"
    held[f"{name}_scale"] = torch.ones(63, 1)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = f"{name}_scale: expected float32 of shape 64x1, found float32 of shape 63x1"
    assert lines(examined(capsys, tmp_path, code=2)) == [f"model.safetensors: {expected}"]
    del held[f"{name}_scale"]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "expected float32 of shape 64x1, found nothing" in lines(examined(capsys, tmp_path, code=2))[0]
    held |= {f"{name}_scale": torch.ones(64, 2, dtype=torch.float16), f"{name}_zero": torch.ones(64, 2)}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = lines(examined(capsys, tmp_path, code=2))  # groups of 32 that config.json knows nothing of
    assert [line.partition(": ")[2].partition(":")[0] for line in found] == [f"{name}_scale", f"{name}_zero"]
