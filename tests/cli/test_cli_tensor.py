"""gemmakit run, batch and bench --tensor N: several processes, one command."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_process import command_line, environment


def test_two_processes_answer_as_one(gemmakit, tiny):
    asked = ("run", "--model", tiny, "--dtype", "float32", "-n", "8", "--format", "text", "--json")
    texts = "def add(\nIf the file\n"
    one, two = (gemmakit(*asked, *more, stdin=texts) for more in ((), ("--tensor", "2")))
    assert (two.returncode, two.stderr) == (0, "")
    assert [json.loads(line)["generated_text"] for line in two.stdout.splitlines()] == [
        json.loads(line)["generated_text"] for line in one.stdout.splitlines()
    ]


def test_a_process_among_others_answers_by_itself_unless_it_is_told_to_share(gemmakit, tiny, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as in a job whose processes each do something of their own
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = gemmakit("run", "def add(", "--model", tiny, "-n", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.slow  # three processes that load torch, to be refused
def test_what_cannot_be_split_is_one_line(gemmakit, tiny):
    done = gemmakit("run", "x", "--model", tiny, "--tensor", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "num_attention_heads is 4, which 3 processes cannot share: take 1, 2, 4 of them" in done.stderr


def test_told_to_end_it_ends_as_a_shell_says_it_and_without_a_word(tiny):
    line = command_line("run", "x", "--model", tiny, "--tensor", "2")
    process = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs Linux's list of a process's children")
    while len(children.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + signal.SIGTERM, "")


def test_what_has_no_parts_is_refused_before_anything_starts(gemmakit, tiny):
    done = gemmakit("run", "x", "--model", tiny, "--tensor", "2", "--backend", "flax")
    assert done.returncode == 2
    assert "--tensor splits a plain PyTorch model" in done.stderr


def test_a_batch_of_two_processes_has_the_answers_of_one(gemmakit, tiny, tmp_path):
    rows = [{"prompt": f"text {i}", "custom_id": f"id {i}", "max_tokens": 4 + i % 3} for i in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name, more in {"one": (), "two": ("--tensor", "2")}.items():
        asked = ("batch", tmp_path / "in.jsonl", tmp_path / name, "--model", tiny, "--dtype", "float32", *more)
        done = gemmakit(*asked)
        assert done.returncode == 0, done.stderr
        said = map(json.loads, (tmp_path / name).read_text().splitlines())
        found.append({line["custom_id"]: line["text"] for line in said})
    assert found[0] == found[1]
    assert len(found[0]) == 12


@pytest.mark.slow  # the machine's limits are measured too
def test_bench_measures_a_process_of_two(gemmakit, tmp_path):
    done = gemmakit("bench", "--size", "tiny", "--tensor", "2", "--quick", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert "are those of one process" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["speed"]["decode_tokens_per_s"] > 0
