"""gemmakit batch: the answers of gemmakit run, whatever interrupts it; refusals in one line."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import time

import pytest
from batch_kills import answers, measure
from cli_process import command_line, environment

from gemmakit.cli.batch import _body
from gemmakit.serve.batch_format import parse_row


def question(i, **settings):
    return {"messages": [{"role": "user", "content": f"What is {i} + 58?"}], "custom_id": f"id {i}", **settings}


def openai(i, **settings):
    body = {"model": "gpt-4o", "messages": question(i)["messages"], **settings}
    return {"custom_id": f"o {i}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def records(path):
    return {record["custom_id"]: record for record in map(json.loads, path.read_text().splitlines())}


def started(*arguments, **options):
    return subprocess.Popen(
        command_line("batch", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), **options,
    )  # fmt: skip


def wait_for_lines(path, count, child):
    end = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.01)


def test_answers_are_those_of_run_in_both_formats_and_a_bad_row_costs_itself(gemmakit, tmp_path):
    source = write(
        tmp_path / "in.jsonl", [question(34), openai(34), "{", openai(7), {"prompt": "If the", "max_tokens": 4}]
    )
    done = gemmakit("batch", source, tmp_path / "out.jsonl")
    assert (done.returncode, done.stdout) == (0, "")
    assert "4 answers in" in done.stderr
    assert "1 errors in" in done.stderr
    said = gemmakit("run", "--chat", "What is 34 + 58?").stdout.strip()
    found = records(tmp_path / "out.jsonl")
    assert found["id 34"]["text"] == said
    response = found["o 34"]["response"]
    assert response["status_code"] == 200
    assert response["body"]["choices"][0]["message"]["content"] == said
    assert found["row-5"]["usage"]["completion_tokens"] == 4
    (error,) = map(json.loads, (tmp_path / "out.jsonl.errors").read_text().splitlines())
    assert (error["line"], error["error"]["code"]) == (3, "invalid_json_line")
    again = gemmakit("batch", source, tmp_path / "out.jsonl", "--resume", "--seed", 5)
    assert again.returncode == 2
    assert again.stderr.startswith("gemmakit: --resume: seed is 5, but")
    assert len(again.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.jsonl", "out.jsonl"], "absent.jsonl cannot be read: No such file or directory."),
        (["in.jsonl", "no/out.jsonl"], "there is no folder"),
        (["in.jsonl", "in.jsonl"], "must be different files"),
        (["in.jsonl", "out.jsonl", "--concurrency", "0"], "concurrency"),
        (["in.jsonl", "out.jsonl", "-m", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_begun_is_one_line_and_writes_nothing(gemmakit, tmp_path, arguments, said):
    write(tmp_path / "in.jsonl", [question(1)])
    paths = [str(tmp_path / a) if a.endswith(".jsonl") else a for a in arguments]
    done = gemmakit("batch", *paths)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(gemmakit, tmp_path):
    asked = [question(i, max_tokens=8, temperature=1.0) for i in range(4000)]
    source = write(tmp_path / "in.jsonl", asked)
    out = tmp_path / "out.jsonl"
    child = started(source, out)
    wait_for_lines(out, 5, child)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "interrupted" in said.splitlines()[-1] and "--resume" in said.splitlines()[-1]
    kept = records(out)
    assert 5 <= len(kept) < 4000
    write(tmp_path / "few.jsonl", [one for i, one in enumerate(asked) if f"id {i}" in kept])
    assert gemmakit("batch", tmp_path / "few.jsonl", tmp_path / "few.out").returncode == 0
    assert answers(tmp_path / "few.out") == answers(out)  # drawn alike, whatever ran beside them


def test_a_full_disk_is_one_line_and_leaves_whole_ones(tmp_path):
    source = write(tmp_path / "in.jsonl", [question(i) for i in range(40)])
    out = tmp_path / "out.jsonl"
    child = started(source, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)))
    _, said = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "the disk is full" in said.splitlines()[-1] and "--resume" in said.splitlines()[-1]
    assert 0 < len(records(out)) == out.read_bytes().count(b"\n") < 40


def test_rows_that_draw_get_a_seed_of_their_own_and_others_none():
    def body(row, drawn=False, seed=0):
        return _body(parse_row(json.dumps(row).encode(), 1), drawn, None, seed)

    assert "seed" not in body(question(1))
    assert "seed" not in body(question(1, temperature=0), drawn=True)
    assert body(question(1, temperature=1, seed=7))["seed"] == 7
    one, two = body(question(1, temperature=1))["seed"], body(question(2, temperature=1))["seed"]
    assert one != two
    assert one == body(question(1, temperature=1))["seed"] != body(question(1, temperature=1), seed=1)["seed"]
    assert body(question(1), drawn=True)["seed"] == one


def test_short_rows_have_the_limit_of_run_and_openais_that_of_the_server():
    def body(row, limit=None):
        return _body(parse_row(json.dumps(row).encode(), 1), False, limit, 0)

    assert body(question(1))["max_tokens"] == 256
    assert body(question(1, max_completion_tokens=9)).get("max_tokens") is None
    assert "max_tokens" not in body(openai(1))
    assert body(openai(1), 5)["max_tokens"] == 5
    assert body(openai(1, max_tokens=3), 5)["max_tokens"] == 3


@pytest.mark.slow
def test_a_batch_killed_at_random_moments_gives_each_row_once_and_equal_to_an_uninterrupted_run(tmp_path):
    found = measure(tmp_path, 300, 5)
    assert (found["missing"], found["doubled"], found["different"]) == (0, 0, 0)
    assert (found["answers"], found["errors"]) == (294, 6)
    assert found["done_twice"] < 5 * 8 / 300  # eight rows are under way, each a part of it done
