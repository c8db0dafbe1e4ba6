"""Files and batches by the openai client: what is answered, whose it is, and that nothing is lost by a kill."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import openai
import pytest
from running_server import NAME
from test_serve_process import serve as process  # noqa: F401
from test_serve_process import start

from gemmakit.serve import feeder
from gemmakit.serve.settings import ServeSettings

LIMIT_S = 60.0


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def asked(count: int, **body: object) -> bytes:
    """Sums to ask, by one id each."""

    def row(i: int) -> dict[str, object]:
        question = [{"role": "user", "content": f"What is {i} + {2 * i}?"}]
        own = {"model": NAME, "messages": question, "max_tokens": 8, "temperature": 0, **body}
        return {"custom_id": f"id-{i}", "method": "POST", "url": "/v1/chat/completions", "body": own}

    return "".join(json.dumps(row(i)) + "\n" for i in range(count)).encode()


def begin(client: openai.OpenAI, rows: bytes) -> openai.types.Batch:
    file = client.files.create(file=("rows.jsonl", rows), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"who": "me"}
    )


def ended(client: openai.OpenAI, name: str) -> openai.types.Batch:
    until = time.monotonic() + LIMIT_S
    while (batch := client.batches.retrieve(name)).status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < until, batch
        time.sleep(0.05)
    return batch


def results(client: openai.OpenAI, file: str | None) -> list[dict[str, object]]:
    assert file is not None
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]


def test_a_batch_gives_what_the_same_requests_give_alone(serve, tmp_path: Path):
    client = client_of(serve(ServeSettings(state=tmp_path / "state")).url)
    rows = asked(6) + b'{"custom_id": "bad"}\n' + asked(7, temperature=-1).splitlines()[-1] + b"\n"
    batch = ended(client, begin(client, rows).id)
    assert batch.status == "completed" and batch.metadata == {"who": "me"}
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 8, "completed": 6, "failed": 2}
    for line in results(client, batch.output_file_id):
        number = int(line["custom_id"].removeprefix("id-"))
        alone = client.chat.completions.create(**json.loads(asked(number + 1).splitlines()[-1])["body"])
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content
    errors = results(client, batch.error_file_id)
    assert [(line["line"], line["custom_id"]) for line in errors] == [(7, "bad"), (8, "id-6")]
    assert [one.id for one in client.batches.list()] == [batch.id]


def test_files_are_listed_page_by_page_and_deleted(serve, tmp_path: Path):
    client = client_of(serve(ServeSettings(state=tmp_path / "state")).url)
    made = [client.files.create(file=(f"{i}.jsonl", b"x" * i), purpose="batch") for i in range(1, 6)]
    assert [file.bytes for file in made] == [1, 2, 3, 4, 5]
    assert [file.id for file in client.files.list(limit=2)] == [file.id for file in made[::-1]]
    assert client.files.retrieve(made[2].id) == made[2]
    assert client.files.content(made[2].id).content == b"xxx"
    assert client.files.delete(made[2].id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made[2].id)


def test_files_and_batches_belong_to_the_key_they_came_with(serve, tmp_path: Path):
    url = serve(ServeSettings(state=tmp_path / "state", api_keys=("mine", "yours"))).url
    mine, yours = client_of(url, "mine"), client_of(url, "yours")
    batch = begin(mine, asked(2))
    for look in (yours.batches.retrieve, yours.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            look(batch.id)
    for look in (yours.files.retrieve, yours.files.content, yours.files.delete):
        with pytest.raises(openai.NotFoundError):
            look(batch.input_file_id)
    with pytest.raises(openai.NotFoundError):
        yours.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    assert list(yours.files.list()) == list(yours.batches.list()) == []
    assert ended(mine, batch.id).status == "completed"


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", "x" * 300])
def test_a_file_name_that_could_be_a_path_is_refused(serve, tmp_path: Path, name: str):
    client = client_of(serve(ServeSettings(state=tmp_path / "state")).url)
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=(name, b"x"), purpose="batch")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["state", *(path.name for path in (tmp_path / "state").iterdir())]
    )


def test_a_file_over_the_limit_is_413_and_one_over_a_body_s_limit_is_not(serve, tmp_path: Path):
    settings = ServeSettings(state=tmp_path / "state", max_body_bytes=1000, max_upload_bytes=10_000)
    client = client_of(serve(settings).url)
    assert client.files.create(file=("x", b"x" * 5000), purpose="batch").bytes == 5000
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("x", b"x" * 20_000), purpose="batch")
    assert refused.value.status_code == 413


def test_without_a_state_it_is_said_how_to_have_one(server):
    with pytest.raises(openai.NotFoundError, match="--state"):
        client_of(server.url).files.create(file=("x", b"x"), purpose="batch")


def test_a_cancelled_batch_ends_with_what_is_done(serve, tmp_path: Path):
    client = client_of(serve(ServeSettings(state=tmp_path / "state"), max_batch_size=2).url)
    batch = begin(client, asked(200, max_tokens=64, ignore_eos=True))
    while not (client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed:
        time.sleep(0.02)
    client.batches.cancel(batch.id)
    batch = ended(client, batch.id)
    assert batch.status == "cancelled" and batch.request_counts is not None
    assert 0 < batch.request_counts.completed == len(results(client, batch.output_file_id)) < 200
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.batches.cancel(batch.id)


def test_clients_are_answered_while_a_batch_runs(serve, tmp_path: Path):
    client = client_of(serve(ServeSettings(state=tmp_path / "state"), max_batch_size=2).url)
    batch = begin(client, asked(300, max_tokens=64, ignore_eos=True))
    while client.batches.retrieve(batch.id).status != "in_progress":
        time.sleep(0.02)
    said = client.completions.create(model=NAME, prompt="x", max_tokens=4, extra_body={"ignore_eos": True})
    assert said.usage is not None and said.usage.completion_tokens == 4
    assert client.batches.retrieve(batch.id).status == "in_progress"


def test_a_batch_outlives_kill_9_and_every_row_is_there_once(process, tmp_path: Path):  # noqa: F811
    server, url = process("--state", tmp_path / "state", "--device", "cpu", "--served-model-name", NAME)
    batch = begin(client_of(url), asked(120, ignore_eos=True))
    until = time.monotonic() + LIMIT_S
    while (counts := client_of(url).batches.retrieve(batch.id).request_counts) is None or counts.completed < 5:
        assert time.monotonic() < until
        time.sleep(0.01)
    server.kill()
    server.wait()
    assert counts.completed < 120, "it was killed too late to show anything"
    _, url = process("--state", tmp_path / "state", "--device", "cpu", "--served-model-name", NAME)
    client = client_of(url)
    batch = ended(client, batch.id)
    assert batch.status == "completed" and batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 120, "completed": 120, "failed": 0}
    lines = results(client, batch.output_file_id)
    assert [line["custom_id"] for line in lines] == [f"id-{i}" for i in range(120)]
    body = json.loads(asked(120).splitlines()[-1])["body"]
    again = client.chat.completions.create(**body, extra_body={"ignore_eos": True})
    assert lines[-1]["response"]["body"]["choices"][0]["message"]["content"] == again.choices[0].message.content


def test_a_full_disk_is_said_loses_nothing_and_all_goes_on_when_there_is_room(serve, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(feeder, "RETRY_S", 0.05)
    server = serve(ServeSettings(state=tmp_path / "state"))
    client, db = client_of(server.url), server.service.store._db
    kept = client.files.create(file=("kept.jsonl", b"kept"), purpose="batch")
    batch = begin(client, asked(80, logprobs=True, top_logprobs=8, ignore_eos=True))
    while not client.batches.retrieve(batch.id).request_counts.completed:
        time.sleep(0.01)
    room = db.execute("pragma max_page_count").fetchone()[0]
    db.execute(f"pragma max_page_count = {db.execute('pragma page_count').fetchone()[0] + 4}")  # a disk that is full
    for refused in (
        lambda: client.files.create(file=("more.jsonl", b"x" * 200_000), purpose="batch"),
        lambda: [begin(client, asked(1)) for _ in range(1000)],
    ):
        with pytest.raises(openai.InternalServerError, match="is the disk full") as error:
            refused()
        assert error.value.status_code == 503 and error.value.body["code"] == "storage"
    stopped = client.batches.retrieve(batch.id)
    assert stopped.status == "in_progress" and stopped.request_counts.completed < 80
    assert client.files.content(kept.id).content == b"kept" and len(results(client, batch.input_file_id)) == 80
    assert server.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200
    assert db.execute("pragma integrity_check").fetchone()[0] == "ok"
    db.execute(f"pragma max_page_count = {room}")
    batch = ended(client, batch.id)
    assert batch.request_counts.to_dict() == {"total": 80, "completed": 80, "failed": 0}
    assert [line["custom_id"] for line in results(client, batch.output_file_id)] == [f"id-{i}" for i in range(80)]


def test_a_database_damaged_under_a_server_costs_files_alone_and_is_named_at_the_next_start(serve, tmp_path: Path):
    server = serve(ServeSettings(state=tmp_path / "state"))
    client, database = client_of(server.url), tmp_path / "state" / "serve.sqlite"
    file = client.files.create(file=("rows.jsonl", b"row " * 2**20), purpose="batch")
    server.service.store._db.execute("pragma wal_checkpoint(truncate)")
    damaged = database.read_bytes()[: database.stat().st_size // 2]
    database.write_bytes(damaged)
    with pytest.raises((openai.APIError, httpx.HTTPError)):  # never a part of it as if it were all
        client.files.content(file.id)
    with pytest.raises(openai.InternalServerError) as error:
        client.files.create(file=("more.jsonl", b"x" * 2**23), purpose="batch")
    assert error.value.status_code == 503
    assert server.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "serve.sqlite").write_bytes(damaged)
    again = start("--port", 0, "--state", copy)
    _, said = again.communicate(timeout=60)
    lines = [line for line in said.splitlines() if "loading" not in line]
    assert again.returncode == 2 and len(lines) == 1 and "another --state" in lines[0]
    assert (copy / "serve.sqlite").read_bytes() == damaged
