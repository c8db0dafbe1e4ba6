"""gemmakit tune and merge: a file in, an adapter out that run and chat take; a refusal is one line, before step 1."""

from __future__ import annotations

import json
import os
import signal

import pytest

ROWS = [{"prompt": f"Say {word}", "completion": f"{word} {word}"} for word in ("red", "blue", "green", "white")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def test_a_file_becomes_an_adapter_that_runs_and_merges(said, tiny, rows, tmp_path):
    out, merged, config = tmp_path / "out", tmp_path / "merged", tmp_path / "tune.toml"
    config.write_text(f'model = "{tiny}"\nbatch-size = 2\nrank = 4\nlr = 0.05\nmax-steps = 100\n')
    code, printed, beside = said(
        "tune", "--config", config, "--out", out, "--max-steps", 6, "--log-steps", 2, tiny, rows
    )
    assert code == 0, beside
    assert "step 2/6: loss" in beside and "tokens/s" in beside
    assert printed.splitlines()[-1] == str(out)
    written = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "README.md", "tune.json"} <= written
    settings = json.loads((out / "tune.json").read_text())["settings"]
    assert (settings["rank"], settings["max_steps"], settings["model"]) == (4, 6, str(tiny))
    asking = ("--greedy", "-n", 6, "Say red")
    plain, adapted = said("run", "--model", tiny, *asking), said("run", "--model", tiny, "--adapter", out, *asking)
    assert adapted[0] == 0 and adapted[1] != plain[1]
    assert said("merge", tiny, out, merged)[0] == 0
    assert said("run", "--model", merged, *asking)[1] == adapted[1]
    code, _, beside = said("merge", tiny, out, merged)
    assert code == 2 and "not empty" in beside


def test_chat_takes_an_adapter(said, tiny, tmp_path):
    code, _, beside = said("chat", "--model", tiny, "--adapter", tmp_path)
    assert code == 2 and "holds no adapter" in beside


def test_adapters_of_a_server_are_named_each_once_or_one_is_for_all(said, tmp_path):
    for given, expected in [
        (("a=x", "a=y"), "--adapter is 'a=y'; it must be NAME=DIR, each name once"),
        (("=x",), "--adapter is '=x'"),
        ((str(tmp_path), "a=x"), f"write NAME={tmp_path}"),
    ]:
        code, _, beside = said("serve", *(part for text in given for part in ("--adapter", text)))
        assert code == 2 and expected in beside and beside.count("\n") == 1, beside


def test_what_is_learnt_is_shown_and_what_it_takes_is_said(said, tiny, rows):
    code, printed, beside = said("tune", tiny, rows, "--chat", "--show", 1)
    assert code == 0, beside
    assert "rows.jsonl:1: " in printed and "[[red red<end_of_turn>]]" in printed
    code, printed, beside = said("tune", tiny, rows, "--dry-run", "--batch-size", 2)
    assert code == 0, beside
    assert "2 steps of 2 x 1 units" in printed and "tokens/s" in printed


def test_refusals_are_one_line_and_write_nothing(said, tiny, rows, tmp_path):
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    for arguments, expected in [
        ((tiny, bad, "--out", out, "--batch-size", 1), "bad.jsonl:2: lacks 'completion'"),
        ((tiny, rows), "lacks out"),
        ((tiny, rows, "--out", out, "--lr", "0"), "lr is 0.0"),
        ((tiny, rows, "--out", out, "--full", "--dora"), "leave --dora out"),
        ((tiny, rows, "--out", out, "--columns", "prompt"), "prompt=question"),
        ((tiny, rows, "--out", out, "--resume"), "the folder of the run alone"),
        ((tmp_path, "--resume", "--dry-run"), "the folder of the run alone"),
        ((tmp_path, "--resume"), "no run to go on with"),
        ((tiny, tmp_path / "none.jsonl", "--out", out), "neither a file nor a folder"),
        (("--config", bad, "--out", out), "not valid TOML"),
    ]:
        code, _, beside = said("tune", *arguments)
        assert code == 2 and expected in beside and beside.count("\n") == 1, beside
    assert not (out / "tune.json").exists()


def test_ctrl_c_says_how_to_go_on(said, tiny, rows, tmp_path, monkeypatch):
    from gemmakit.tune.train import Trainer

    step, out = Trainer.step, tmp_path / "out"

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    code, _, beside = said("tune", tiny, rows, "--out", out, "--batch-size", 1)
    assert code == 130
    assert beside.splitlines()[-1] == f"gemmakit: saved. To go on: gemmakit tune {out} --resume"
    monkeypatch.setattr(Trainer, "step", step)
    code, printed, beside = said("tune", out, "--resume")
    assert code == 0 and printed.splitlines()[-1] == str(out), beside
