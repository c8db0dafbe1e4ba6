"""Every row once, whatever ends the process: the laws of the files, with answers that are a function of the row."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from gemmakit.errors import BatchStopped, InputError
from gemmakit.serve.batch_runner import open_run, run_batch

MADE_WITH = {"model": "demo", "seed": 0}


async def echo(row):
    await asyncio.sleep(0)
    text = row.body["prompt"]
    if text == "bad":
        return 400, {"error": {"message": "no"}}
    return 200, {"choices": [{"text": text[::-1], "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(n, bad=50):
    return [{"prompt": "bad" if i % bad == bad - 1 else f"text {i}", "custom_id": f"id {i}"} for i in range(n)]


def finish(source, out, answer=echo, **options):
    run = open_run(source, out, options.pop("made_with", MADE_WITH), **options)
    try:
        asyncio.run(run_batch(run, answer, 4))
    finally:
        run.close()
    return run


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "in.jsonl"
    write(source, asked(200))
    return source, tmp_path / "out.jsonl"


def test_every_good_row_has_one_line_and_every_bad_one_a_line_of_errors(files):
    source, out = files
    run = finish(source, out)
    assert (run.done, run.answers, run.failures, run.tokens) == (200, 196, 4, 392)
    assert sorted(r["custom_id"] for r in records(out)) == sorted(f"id {i}" for i in range(200) if i % 50 != 49)
    assert [(r["line"], r["custom_id"]) for r in records(out.with_name("out.jsonl.errors"))] == [
        (n, f"id {n - 1}") for n in (50, 100, 150, 200)
    ]


def test_a_finished_batch_resumed_asks_nothing(files):
    source, out = files
    finish(source, out)
    before = out.read_bytes()

    async def never(row):
        raise AssertionError(row)

    finish(source, out, never, resume=True)
    assert out.read_bytes() == before


def test_resume_begins_where_nothing_is(files):
    assert finish(*files, resume=True).done == 200


def test_an_output_that_exists_is_not_written_to_without_resume(files):
    source, out = files
    finish(source, out)
    with pytest.raises(InputError, match="--resume"):
        open_run(source, out, MADE_WITH)


@pytest.mark.parametrize(("changed", "named"), [({"model": "other"}, "model"), ({"seed": 1}, "seed")])
def test_what_changed_is_refused_by_name(files, changed, named):
    source, out = files
    finish(source, out)
    with pytest.raises(InputError, match=f"--resume: {named} is"):
        open_run(source, out, {**MADE_WITH, **changed}, resume=True)


def test_a_changed_input_is_refused(files):
    source, out = files
    finish(source, out)
    write(source, asked(201))
    with pytest.raises(InputError, match="--resume: input is"):
        open_run(source, out, MADE_WITH, resume=True)


def test_an_output_of_unknown_origin_is_not_gone_on_with(files):
    source, out = files
    finish(source, out)
    out.with_name("out.jsonl.journal").unlink()
    with pytest.raises(InputError, match="no journal"):
        open_run(source, out, MADE_WITH, resume=True)


def test_input_and_output_are_different_files(files):
    source, _ = files
    with pytest.raises(InputError, match="different files"):
        open_run(source, source, MADE_WITH)
    assert records(source) == asked(200)


@pytest.mark.parametrize("cut", [1, 17, 60])
def test_a_torn_last_line_is_cut_off_and_its_row_asked_again(files, cut):
    source, out = files
    finish(source, out)
    whole = sorted(out.read_bytes().splitlines())
    journal = out.with_name("out.jsonl.journal")  # its first line was written in one step
    os.truncate(journal, journal.stat().st_size - 1)
    for path in (out, out.with_name("out.jsonl.errors")):
        os.truncate(path, path.stat().st_size - cut)
    finish(source, out, resume=True)
    assert sorted(out.read_bytes().splitlines()) == whole
    assert len(records(out.with_name("out.jsonl.errors"))) == 4


def test_a_damaged_line_in_the_middle_is_named(files):
    source, out = files
    finish(source, out)
    lines = out.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * 10 + b"\n"
    out.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match="line 3 is damaged"):
        open_run(source, out, MADE_WITH, resume=True)


def test_two_processes_do_not_write_one_output(files):
    source, out = files
    run = open_run(source, out, MADE_WITH)
    with pytest.raises(InputError, match="another process"):
        open_run(source, out, MADE_WITH, resume=True)
    run.close()
    open_run(source, out, MADE_WITH, resume=True).close()


def test_a_model_that_fails_stops_the_batch_and_keeps_what_is_done(files):
    source, out = files
    count = 0

    async def dies(row):
        nonlocal count
        count += 1
        return await echo(row) if count < 60 else (503, {"error": {"message": "the engine ended"}})

    with pytest.raises(BatchStopped, match=r"the engine ended\. 5\d of 200 rows .* --resume"):
        finish(source, out, dies)
    assert finish(source, out, resume=True).done == 200
    assert len({r["custom_id"] for r in records(out)}) == len(records(out)) == 196


def test_a_full_queue_is_waited_for(files):
    source, out = files
    turn = 0

    async def busy(row):
        nonlocal turn
        turn += 1
        return (429, {}) if turn % 20 == 0 else await echo(row)

    assert finish(source, out, busy).done == 200


PROGRAM = """
    import asyncio, sys, time
    from pathlib import Path
    from gemmakit.serve.batch_runner import open_run, run_batch

    async def answer(row):
        await asyncio.sleep(0.002)
        text = row.body["prompt"]
        if text == "bad":
            return 400, {"error": {"message": "no"}}
        return 200, {"choices": [{"text": text[::-1], "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}

    run = open_run(Path(sys.argv[1]), Path(sys.argv[2]), {"model": "demo", "seed": 0}, resume=True)
    try:
        print("begun", flush=True)
        asyncio.run(run_batch(run, answer, 4))
    finally:
        run.close()
"""


def program(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_a_batch_killed_again_and_again_gives_each_row_once_and_the_same_lines(files, tmp_path):
    source, out = files
    finish(source, tmp_path / "whole.jsonl")
    moments, kept = random.Random(0), []
    for _ in range(6):
        child = program(source, out)
        child.stdout.readline()
        time.sleep(moments.uniform(0.0, 0.03))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kept.append(len(out.read_bytes().splitlines()))
    assert kept == sorted(kept)
    assert kept[-1] > kept[0]
    assert finish(source, out, resume=True).done == 200
    assert sorted(out.read_bytes().splitlines()) == sorted((tmp_path / "whole.jsonl").read_bytes().splitlines())


def test_a_full_disk_is_one_error_and_the_batch_goes_on_when_there_is_room(files):
    source, out = files
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # noqa: E731
    child = program(source, out, preexec_fn=limit)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "BatchStopped" in said and "the disk is full" in said and "--resume" in said
    assert out.read_bytes().endswith(b"\n")
    assert 0 < len(records(out)) < 196
    assert finish(source, out, resume=True).done == 200
    assert len({r["custom_id"] for r in records(out)}) == len(records(out)) == 196


def test_what_was_begun_and_came_to_nothing_is_begun_anew(files):
    source, out = files
    open_run(source, out, {"model": "damaged"}).close()
    assert finish(source, out).done == 200


def test_a_folder_that_is_not_there_is_named(files):
    source, out = files
    with pytest.raises(InputError, match="there is no folder"):
        open_run(source, out.parent / "no" / "out.jsonl", MADE_WITH)
