"""Files and batches on one database: each change whole or absent, each owner's things their own, each row once."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest

from gemmakit.errors import InputError
from gemmakit.serve import feeder as feeding
from gemmakit.serve import store as storing
from gemmakit.serve.feeder import Feeder
from gemmakit.serve.store import Store

SAID = {"endpoint": "/v1/completions", "completion_window": "24h", "metadata": {"k": "v"}}


def lines(n, bad=()):
    body = [{"prompt": "bad" if i in bad else f"text {i}"} for i in range(n)]
    asked = [
        {"custom_id": f"id {i}", "method": "POST", "url": "/v1/completions", "body": b} for i, b in enumerate(body)
    ]
    return "".join(json.dumps(a) + "\n" for a in asked).encode()


async def echo(owner, row):
    await asyncio.sleep(0)
    if row.body["prompt"] == "bad":
        return 400, {"error": {"message": "no"}}
    return 200, {"choices": [{"text": owner, "finish_reason": "stop"}], "usage": {}}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "state")
    yield store
    store.close()


def added(store, content, owner="me", window_s=1000):
    file = store.add_file(owner, "in.jsonl", "batch", io.BytesIO(content))
    return store.add_batch(owner, file["id"], window_s, SAID)


def content(store, name):
    return b"".join(store.content(name))


def fed(store, answer=echo, until=lambda store: not store.unfinished(), room=lambda: True, limit_s=10.0, then=None):
    """Run a feeder until what is waited for is true."""

    async def work():
        feeder = Feeder(store, answer, room, 4)
        task = asyncio.ensure_future(feeder.run())
        end = time.monotonic() + limit_s
        while not until(store):
            assert time.monotonic() < end
            await asyncio.sleep(0.005)
            if task.done():
                task.result()
        if then is not None:
            await then(feeder)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(work())


def test_a_file_is_the_bytes_that_were_given(store, monkeypatch):
    monkeypatch.setattr(storing, "PIECE_BYTES", 10)
    data = os.urandom(95)
    file = store.add_file("me", "x.jsonl", "batch", io.BytesIO(data))
    assert content(store, file["id"]) == data
    assert (file["bytes"], file["filename"], file["object"]) == (95, "x.jsonl", "file")
    assert store.files("me") == [file]
    assert store.delete_file(file["id"]) is None
    assert store.file("me", file["id"]) is None
    assert content(store, file["id"]) == b""


def test_nobody_sees_what_is_another_owners(store):
    batch = added(store, lines(2))
    file = batch["input_file_id"]
    assert store.file("you", file) is None
    assert store.files("you") == store.batches("you") == []
    assert store.batch("you", batch["id"]) is None


def test_a_file_that_expired_goes_and_one_that_a_batch_reads_stays(store, monkeypatch):
    gone = store.add_file("me", "x", "batch", io.BytesIO(b"x"), expires_after=5)
    kept = store.add_file("me", "x", "batch", io.BytesIO(b"x"), expires_after=5)
    store.add_batch("me", kept["id"], 1000, SAID)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 6)
    store.sweep()
    assert [file["id"] for file in store.files("me")] == [kept["id"]]
    assert content(store, gone["id"]) == b""
    assert store.delete_file(kept["id"]) == store.batches("me")[0]["id"]


def test_an_upload_that_breaks_off_leaves_nothing(store, monkeypatch):
    monkeypatch.setattr(storing, "PIECE_BYTES", 4)

    class Breaks(io.BytesIO):
        def read(self, size=-1):
            if self.tell() >= 8:
                raise ConnectionError
            return super().read(size)

    with pytest.raises(ConnectionError):
        store.add_file("me", "x", "batch", Breaks(b"x" * 20))
    assert store.files("me") == []
    assert store._all("select * from pieces") == []


def test_a_batch_is_worked_off_and_a_bad_row_costs_itself(store):
    batch = added(store, lines(20, bad={3}) + b"{\n")
    fed(store)
    batch = store.batch("me", batch["id"])
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 21, "completed": 19, "failed": 2}
    out = [json.loads(line) for line in content(store, batch["output_file_id"]).splitlines()]
    assert [r["custom_id"] for r in out] == [f"id {i}" for i in range(20) if i != 3]
    assert {r["response"]["body"]["choices"][0]["text"] for r in out} == {"me"}
    errors = [json.loads(line) for line in content(store, batch["error_file_id"]).splitlines()]
    assert [(r["line"], r["custom_id"]) for r in errors] == [(4, "id 3"), (21, None)]
    assert store.file("me", batch["output_file_id"])["bytes"] == len(content(store, batch["output_file_id"]))
    times = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
    assert times == sorted(times)


def test_a_batch_without_errors_has_no_error_file(store):
    added(store, lines(3))
    fed(store)
    batch = store.batches("me")[0]
    assert batch["error_file_id"] is None
    assert {file["purpose"] for file in store.files("me")} == {"batch", "batch_output"}


@pytest.mark.parametrize(("data", "code"), [(b"", "empty_file"), (b"\n\n", "empty_file"), (lines(3), "too_many_tasks")])
def test_a_file_without_rows_or_with_too_many_fails_as_a_whole(store, monkeypatch, data, code):
    monkeypatch.setattr(feeding, "MAX_ROWS", 2)
    added(store, data)
    fed(store)
    batch = store.batches("me")[0]
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", code)


def test_rows_wait_while_there_is_no_room(store):
    free = [False]
    added(store, lines(3))
    with pytest.raises(AssertionError):
        fed(store, room=lambda: free[0], limit_s=0.3)
    assert store.batches("me")[0]["request_counts"]["completed"] == 0
    free[0] = True
    fed(store, room=lambda: free[0])
    assert store.batches("me")[0]["status"] == "completed"


def test_a_cancelled_batch_keeps_what_is_done(store):
    async def slow(owner, row):
        await asyncio.sleep(0.0 if row.line < 5 else 60)
        return await echo(owner, row)

    batch = added(store, lines(20))

    async def cancel(feeder):
        store.set_status(batch["id"], "cancelling", unless=feeding.ENDED)
        feeder.cancel(batch["id"])
        while store.unfinished():
            await asyncio.sleep(0.005)

    fed(store, slow, lambda store: store.batch("me", batch["id"])["request_counts"]["completed"] == 4, then=cancel)
    batch = store.batch("me", batch["id"])
    assert (batch["status"], batch["request_counts"]["completed"]) == ("cancelled", 4)
    assert len(content(store, batch["output_file_id"]).splitlines()) == 4


def test_a_batch_whose_time_ends_says_so_of_each_row_left(store):
    async def never(owner, row):
        await asyncio.sleep(60)

    batch = added(store, lines(5), window_s=1)
    fed(store, never)
    batch = store.batch("me", batch["id"])
    assert (batch["status"], batch["request_counts"]["failed"]) == ("expired", 5)
    assert b"batch_expired" in content(store, batch["error_file_id"])


PROGRAM = """
    import asyncio, sys
    from pathlib import Path
    from gemmakit.serve.feeder import Feeder
    from gemmakit.serve.store import Store

    async def answer(owner, row):
        await asyncio.sleep(0.001)
        return 200, {"choices": [{"text": row.body["prompt"], "finish_reason": "stop"}], "usage": {}}

    print("begun", flush=True)
    asyncio.run(Feeder(Store(Path(sys.argv[1])), answer, lambda: True, 4).run())
"""


def test_batches_go_on_after_the_process_was_killed_and_each_row_is_there_once(store, tmp_path):
    batch = added(store, lines(300))
    store.close()
    counts = []
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "state")], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        time.sleep(0.05)
        child.kill()
        child.communicate()
        again = Store(tmp_path / "state")
        counts.append(again.batch("me", batch["id"])["request_counts"]["completed"])
        again.close()
    assert counts == sorted(counts)
    assert counts[-1] > 0
    again = Store(tmp_path / "state")
    fed(again)
    batch = again.batch("me", batch["id"])
    assert batch["request_counts"] == {"total": 300, "completed": 300, "failed": 0}
    out = [json.loads(line)["custom_id"] for line in content(again, batch["output_file_id"]).splitlines()]
    assert out == [f"id {i}" for i in range(300)]
    again.close()


def test_a_full_disk_loses_nothing_and_the_batch_goes_on_when_there_is_room(store, monkeypatch):
    monkeypatch.setattr(feeding, "RETRY_S", 0.01)
    batch = added(store, lines(400))
    pages = store._db.execute("pragma page_count").fetchone()[0]
    store._db.execute(f"pragma max_page_count = {pages + 8}")  # as on a full disk, no page is to be had
    full = []

    async def answer(owner, row):
        return await echo(owner * 200, row)

    def until(store):
        before, counts = full[-1:], store.batch("me", batch["id"])["request_counts"]["completed"]
        full.append(counts)
        return counts > 0 and before == [counts] and len(full) > 20

    fed(store, answer, until)
    assert 0 < full[-1] < 400
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.add_file("me", "x", "batch", io.BytesIO(b"x" * 100_000))
    assert store._db.execute("pragma integrity_check").fetchone()[0] == "ok"
    store._db.execute("pragma max_page_count = 1000000")
    fed(store, answer)
    batch = store.batch("me", batch["id"])
    assert batch["request_counts"] == {"total": 400, "completed": 400, "failed": 0}
    assert len(content(store, batch["output_file_id"]).splitlines()) == 400


def test_a_damaged_database_is_named_and_left_as_it_is(store, tmp_path):
    added(store, lines(500))
    store.close()
    path = tmp_path / "state" / storing.FILE
    damaged = b"\0" * 64 + path.read_bytes()[64:]
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"serve\.sqlite cannot be used .* another --state"):
        Store(tmp_path / "state")
    assert path.read_bytes() == damaged


def test_a_state_folder_belongs_to_one_process(store, tmp_path):
    with pytest.raises(InputError, match="another process"):
        Store(tmp_path / "state")
