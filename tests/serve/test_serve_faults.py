"""What clients do wrong, by mistake or on purpose, costs themselves alone."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import running_server
from running_server import NAME, Running, serving

from gemmakit.serve.server import listen
from gemmakit.serve.settings import ServeSettings

USER = [{"role": "user", "content": "What is 34 + 58?"}]
CHAT = {"messages": USER, "max_tokens": 4, "temperature": 0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def send(server: Running, data: bytes, path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(f"{server.url}{path}", content=data, headers={"Content-Type": "application/json"}, timeout=60)


def free_pages(server: Running) -> int:
    engine = server.service.worker.engine
    return server.service.worker.call(lambda: engine.scheduler.pool.idle).result(10)


@contextmanager
def slow(server: Running) -> Iterator[None]:
    """Its steps take a while, so that an answer of many is seen to run before it has ended."""
    engine = server.service.worker.engine
    step = engine.step

    def slowly() -> Any:
        time.sleep(0.02)
        return step()

    engine.step = slowly
    yield
    engine.step = step


def wait_for(what: Any, seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if what():
            return True
        time.sleep(0.005)
    return False


# -- what is wrong with a request, row 21 to 24 ------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": USER, "temperature": -0.1}, "temperature"),
    ({"messages": USER, "temperature": "hot"}, "temperature"),
    ({"messages": USER, "top_p": 1.5}, "top_p"),
    ({"messages": USER, "n": 10**6}, "n"),
    ({"messages": USER, "n": True}, "n"),
    ({"messages": USER, "max_tokens": 0}, "max_tokens"),
    ({"messages": USER, "max_tokens": 1.5}, "max_tokens"),
    ({"messages": USER, "stop": ["x"] * 10_000}, "stop"),
    ({"messages": USER, "stop": ""}, "stop"),
    ({"messages": USER, "seed": -1}, "seed"),
    ({"messages": USER, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": USER, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"5": 101}}, "logit_bias"),
    ({"messages": USER, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": USER, "response_format": {"type": "yaml"}}, "response_format"),
    ({"messages": USER, "response_format": {"type": "json_schema"}}, "response_format"),
    ({"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"messages": USER, "functions": [{"name": "f"}]}, "functions"),
    ({"messages": USER, "modalities": ["audio"]}, "modalities"),
    ({"messages": USER, "min_tokens": 9, "max_tokens": 3}, "min_tokens"),
]


@pytest.mark.parametrize(("body", "field"), WRONG, ids=[f"{field}-{i}" for i, (_, field) in enumerate(WRONG)])
def test_what_is_wrong_is_400_and_named(server: Running, body: dict[str, Any], field: str):
    said = server.post("/v1/chat/completions", **body)
    assert said.status_code == 400
    assert (said.json()["error"]["param"] or "").startswith(field)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}',
        b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 10_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "json_schema": '
        + b'{"a":' * 9_000
        + b"1"
        + b"}" * 9_000
        + b"}",
    ],
)
def test_malformed_bodies_are_400(server: Running, data: bytes):
    said = send(server, data)
    assert said.status_code == 400 and said.json()["error"]["message"]


@pytest.mark.parametrize("field", ["temperature", "repetition_penalty"])
def test_numbers_that_float32_cannot_divide_by_are_400_and_the_least_that_it_can_is_not(server: Running, field: str):
    """Found by schemathesis: scores became infinite, and the answer a 500."""
    for value in (5e-324, 1e-45, 1e-38, 1e-11):
        said = server.post("/v1/completions", prompt="x", max_tokens=2, **{field: value})
        assert said.status_code == 400 and field in said.json()["error"]["message"]
    least = {"temperature": 1e-10, "repetition_penalty": 1e-10, "min_p": 1.0, "top_p": 1e-45}
    assert server.post("/v1/completions", prompt="x", max_tokens=4, **least).status_code == 200


def test_images_are_refused_by_name(server: Running):
    image = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    said = server.post("/v1/chat/completions", messages=[{"role": "user", "content": image}])
    assert said.status_code == 400 and "image_url" in said.json()["error"]["message"]


def test_text_parts_mean_the_same_as_a_string(server: Running):
    parts = [{"role": "user", "content": [{"type": "text", "text": USER[0]["content"]}]}]
    by_text, by_parts = (
        server.post("/v1/chat/completions", **CHAT),
        server.post("/v1/chat/completions", **{**CHAT, "messages": parts}),
    )
    assert by_text.json()["choices"] == by_parts.json()["choices"]


def test_too_long_is_400_with_both_counts(server: Running):
    said = server.post("/v1/completions", prompt=[5] * 600, max_tokens=4).json()["error"]
    assert "600" in said["message"] and "512" in said["message"] and said["code"] == "context_length_exceeded"
    said = server.post("/v1/completions", prompt=[5] * 20, max_tokens=1000).json()["error"]
    assert "20" in said["message"] and "1000" in said["message"] and "512" in said["message"]
    said = server.post("/v1/completions", prompt=[5, 10**6], max_tokens=4)
    assert said.status_code == 400 and "1000000" in said.text


def test_unknown_fields_are_accepted_and_counted(server: Running):
    before = server.service.unknown_fields["mirostat"]
    assert server.post("/v1/chat/completions", **CHAT, mirostat={"x": 1}).status_code == 200
    assert server.service.unknown_fields["mirostat"] == before + 1
    for i in range(200):
        server.service.count_unknown(type("Body", (), {"unknown": [f"made-up-{i}"]}))
    assert len(server.service.unknown_fields) < 100


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(300):
    DEEP = {"type": "object", "properties": {"a": DEEP}}

SHAPES: list[dict[str, Any]] = [
    {"regex": "(unclosed"},
    {"regex": "(((((a{9}){9}){9}){9}){9}){9}"},
    {"regex": "x(((((a{9}){9}){9}){9}){9}){9}"},
    {"regex": "(?=a)b"},
    {"regex": "(?:a?){5000}a{5000}"},
    {"grammar": "start: start"},
    {"grammar": 'start: "a" undefined_rule'},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"$ref": "http://127.0.0.1:9/schema"}},
    {"json_schema": {"type": "nope"}},
    {"json_schema": DEEP},
    {"json_schema": {"type": "string", "pattern": "((((((a{9}){9}){9}){9}){9}){9}){9}"}},
    {"json_schema": {"type": "object"}, "regex": "a"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_shapes_that_cannot_be_followed_are_400_in_bounded_time(server: Running, shape: dict[str, Any]):
    said = server.post("/v1/completions", prompt="x", max_tokens=4, **shape)  # a minute at most: the client's own limit
    assert said.status_code == 400, said.text


def test_a_schema_is_followed(server: Running):
    schema: dict[str, Any] = {"type": "object", "properties": {"sum": {"type": "integer", "maximum": 999}}}
    schema |= {"required": ["sum"], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    said = server.post("/v1/chat/completions", **{**CHAT, "max_tokens": 60}, response_format=asked)
    assert isinstance(json.loads(said.json()["choices"][0]["message"]["content"])["sum"], int)
    any_object = server.post("/v1/chat/completions", **{**CHAT, "max_tokens": 60}, regex=r"[0-9]{2}-[a-c]x")
    assert any_object.json()["choices"][0]["message"]["content"][2] == "-"


# -- who leaves, who is slow, who floods: 25 to 27 ---------------------------------------------------------------------

LONG = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}


def begin(server: Running, **body: Any) -> socket.socket:
    """A request under way, whose answer nobody reads."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    made = socket.create_connection((host, int(port)), timeout=30)
    made.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return made


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_its_pages_whatever_it_waited_for(stream: bool):
    with serving(max_batch_size=1) as server, slow(server):
        whole = free_pages(server)
        body = {**LONG, "stream": stream}
        running, queued = begin(server, **body), begin(server, **body)
        stats = server.service.worker.engine.stats
        assert wait_for(lambda: (stats().running, stats().waiting) == (1, 1))
        queued.close()
        assert wait_for(lambda: stats().waiting == 0)
        running.close()
        assert wait_for(lambda: stats().running == 0) and free_pages(server) == whole
        assert server.post("/v1/completions", prompt="x", max_tokens=2).status_code == 200


def test_a_hundred_who_leave_at_random_moments_leave_nothing_behind():
    """Queued, in a prompt of many parts, while tokens come."""
    with serving(max_batch_size=4, prefill_tokens=16, cache_tokens=1024) as server:
        whole = free_pages(server)

        def visit(place: int) -> None:
            long = {"prompt": [2, *range(300 + place, 400 + place)], "max_tokens": 300}
            made = begin(server, **{**LONG, **(long if place % 2 else {}), "stream": place % 3 > 0})
            time.sleep((place * 7919 % 100) / 400)
            made.close()

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(visit, range(100)))
        assert server.post("/v1/completions", prompt="x", max_tokens=2).status_code == 200
        assert wait_for(lambda: not server.service.worker.busy) and free_pages(server) == whole


def test_a_reader_that_never_reads_is_dropped_with_a_reason_and_others_go_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def narrow(*address: Any) -> socket.socket:
        """The system's own buffers would take megabytes for a reader: here they are as small as it lets them be."""
        made = listen(*address)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return made

    monkeypatch.setattr(running_server, "listen", narrow)
    settings = ServeSettings(buffered_events=32, log_format="json")
    with serving(settings) as server, caplog.at_level(logging.INFO, "gemmakit.access"):
        whole = free_pages(server)
        made = begin(server, **{**LONG, "logprobs": 20, "n": 4})
        assert server.post("/v1/completions", prompt="x", max_tokens=8).status_code == 200
        assert wait_for(lambda: free_pages(server) == whole)
        assert wait_for(lambda: len(caplog.records) == 2)  # one's line is written when it has ended
        told = [json.loads(record.getMessage())["finish_reason"] for record in caplog.records]
        assert sorted(told) == ["length", "slow reader"]
        made.close()


def test_a_flood_is_told_to_come_again_and_nothing_accepted_is_lost():
    with serving(max_batch_size=2, max_waiting=4) as server:

        async def flood() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=60)
            async with httpx.AsyncClient(timeout=120, limits=limits) as client:
                asked = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
                return await asyncio.gather(
                    *(client.post(f"{server.url}/v1/completions", json=asked) for _ in range(60))
                )

        said = asyncio.run(flood())
        accepted = [one for one in said if one.status_code == 200]
        refused = [one for one in said if one.status_code != 200]
        assert len(accepted) >= 6 and refused
        assert all(one.json()["usage"]["completion_tokens"] == 60 for one in accepted)
        assert all(one.status_code == 429 and int(one.headers["retry-after"]) >= 1 for one in refused)


def test_who_waits_too_long_is_told():
    with serving(ServeSettings(queue_s=0.05), max_batch_size=1) as server, slow(server):
        made = begin(server, **LONG)
        assert wait_for(lambda: server.service.worker.engine.stats().running == 1)
        said = server.post("/v1/completions", prompt="x", max_tokens=2)
        assert said.status_code == 503 and said.json()["error"]["code"] == "queue_timeout"
        made.close()


# -- one request's trouble is its own: 32, 42 --------------------------------------------------------------------------


def test_an_engine_that_dies_is_told_to_everybody():
    with serving() as server, slow(server):
        made = begin(server, **LONG)
        waiting = ThreadPoolExecutor(1).submit(
            server.post, "/v1/completions", prompt="x", max_tokens=400, ignore_eos=True
        )
        worker = server.service.worker
        assert wait_for(lambda: worker.engine.stats().running == 2)

        def broken() -> Any:
            raise RuntimeError("broken on purpose")

        worker.engine.step = broken
        said = waiting.result(20)
        assert said.status_code == 503 and said.json()["error"]["code"] == "engine_dead"
        streamed = b""
        while b"engine_dead" not in streamed and (data := made.recv(65536)):
            streamed += data
        assert b"engine_dead" in streamed
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert server.post("/v1/completions", prompt="x").status_code == 503
        made.close()


# -- HTTP itself: 40 ---------------------------------------------------------------------------------------------------

BODY = b'{"prompt": "x", "max_tokens": 2}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


def exchange(server: Running, data: bytes, pieces: int | None = None) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), pieces or len(data)):
            made.sendall(data[start : start + (pieces or len(data))])
        made.settimeout(20)
        return b"".join(iter(lambda: made.recv(65536), b""))


CLOSE = b"Connection: close\r\n"


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (HEAD.replace(b"1.1", b"1.0") + LENGTH + b"\r\n" + BODY, [b"200"]),
        (HEAD + LENGTH + b"\r\n" + BODY + HEAD + CLOSE + LENGTH + b"\r\n" + BODY, [b"200", b"200"]),
        (HEAD + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n", [b"200"]),
        (
            HEAD + CLOSE + b"Transfer-Encoding: chunked\r\nTrailer: x-a\r\n\r\n%x\r\n" % len(BODY) + BODY
            + b"\r\n0\r\nx-a: b\r\n\r\n",
            [b"200"],
        ),
        (HEAD + CLOSE + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY, [b"400"]),
        (HEAD + CLOSE + b"Content-Length: -5\r\n\r\n" + BODY, [b"400"]),
        (HEAD + CLOSE + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n" + BODY, [b"400"]),
        (b"nonsense\r\n\r\n", [b"400"]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", [b"400"]),
    ],
    ids=range(9),
)  # fmt: skip
def test_http_is_right_or_400(server: Running, data: bytes, statuses: list[bytes]):
    said = exchange(server, data)
    assert [part.split()[0] for part in said.split(b"HTTP/1.1 ")[1:]] == statuses


def test_an_endless_header_ends_its_connection(server: Running):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as made:
        made.sendall(HEAD + b"X: ")

        def on() -> None:
            while True:
                made.sendall(b"y" * 2**16)

        with pytest.raises(OSError):
            on()
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_byte_at_a_time_arrives(server: Running):
    said = exchange(server, HEAD + CLOSE + LENGTH + b"\r\n" + BODY, pieces=1)
    assert said.startswith(b"HTTP/1.1 200") and json.loads(said.partition(b"\r\n\r\n")[2])["model"] == NAME


def test_a_body_with_both_lengths_is_never_two_requests(server: Running):
    """Content-Length beside Transfer-Encoding: a proxy may have believed the other one."""
    inner = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    said = exchange(server, HEAD + CLOSE + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner)
    assert said.count(b"HTTP/1.1 ") == 1 and said.startswith(b"HTTP/1.1 400")
