"""Who may ask, and how much: hosts, origins, keys, bodies, and what the log says of them."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time

import httpx
import pytest
from running_server import NAME, Running

from gemmakit.serve.settings import ServeSettings

JSON = {"Content-Type": "application/json"}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHAT = {"messages": [{"role": "user", "content": "What is 34 + 58?"}], "max_tokens": 4, "temperature": 0}
ROUTES = ["/v1/models", "/version", "/v1/chat/completions", "/openapi.json", "/nothing"]


def raw(server: Running, data: bytes, timeout: float = 10) -> bytes:
    """What the server answers to these bytes, until it closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as made:
        made.sendall(data)
        made.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: made.recv(65536), b""))


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "[::1", "a b"])
def test_another_host_is_refused_and_not_repeated(server: Running, host: str):
    said = raw(server, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert said.split()[1] in (b"403", b"400")
    assert b"evil" not in said and b"nip.io" not in said


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]:99", "LOCALHOST:1", "10.1.2.3"])
def test_own_names_and_numbers_are_served(server: Running, host: str):
    assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://localhost.evil.example", "http://127.0.0.1"]
)
def test_another_origin_is_refused(server: Running, origin: str):
    said = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers={"Origin": origin})
    assert said.status_code == 403 and "access-control-allow-origin" not in said.headers and "evil" not in said.text
    preflight = httpx.options(
        f"{server.url}/v1/chat/completions", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 403 and "access-control-allow-origin" not in preflight.headers


def test_own_page_may_ask_and_named_sites_may(server: Running, serve):
    own = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers={"Origin": server.url})
    assert own.status_code == 200
    named = serve(ServeSettings(cors_origins=("https://chat.example",)))
    headers = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{named.url}/v1/chat/completions", headers=headers)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
    other = httpx.options(f"{named.url}/v1/chat/completions", headers={**headers, "Origin": "https://other.example"})
    assert other.status_code == 403


@pytest.fixture(scope="module")
def locked():
    from running_server import serving

    with serving(ServeSettings(api_keys=("first-key", "second-key"))) as running:
        yield running


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer wrong")],
        [("Authorization", "Bearer FIRST-KEY")],
        [("Authorization", "Bearer first-ke")],
        [("Authorization", "Basic first-key")],
        [("Authorization", "first-key")],
        [("Authorization", "Bearer first-key"), ("Authorization", "Bearer first-key")],
        [("Authorization", "Bearer first-key"), ("x-api-key", "second-key")],
        [("x-api-key", "")],
    ],
)
def test_every_route_but_health_asks_for_the_key(locked: Running, path: str, headers):
    said = httpx.request("POST" if "chat" in path else "GET", f"{locked.url}{path}", headers=headers)
    assert said.status_code == 401
    assert said.json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{locked.url}/", headers=headers).status_code == 401


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer second-key"}, {"x-api-key": "first-key"}])
def test_any_of_the_keys_opens(locked: Running, headers):
    assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{locked.url}/health").status_code == 200


def test_large_bodies_are_refused_before_they_are_read(server: Running):
    told = raw(server, HEAD + b"Content-Length: 999999999999\r\n\r\n")
    assert told.split()[1] == b"413"

    def endless():
        for _ in range(100):
            yield b" " * 2**16

    said = httpx.post(f"{server.url}/v1/chat/completions", content=endless(), headers=JSON)
    assert said.status_code == 413


def test_a_body_that_does_not_arrive_is_given_up(serve):
    slow = serve(ServeSettings(body_s=0.3))
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as made:
        made.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        assert made.recv(100).split()[1] == b"408"


def test_a_head_that_does_not_arrive_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gemmakit.serve.patience.HEAD_S", 0.3)
    host, port = server.url.removeprefix("http://").split(":")
    for begun in (b"", b"GET /health HTTP/1.1\r\nHost: lo", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"):
        # After an answer uvicorn itself waits five seconds for the next request.
        with socket.create_connection((host, int(port)), timeout=30) as made:
            made.sendall(begun)
            said = b""
            with contextlib.suppress(ConnectionResetError):
                while data := made.recv(65536):
                    said += data
            assert said.count(b"HTTP/1.1 200") == begun.count(b"\r\n\r\n")


@pytest.mark.parametrize("kind", ["text", "json"])
def test_log_is_one_line_a_request_without_texts(serve, caplog, kind: str):
    running = serve(ServeSettings(log_format=kind))
    with caplog.at_level(logging.INFO, "gemmakit.access"):
        httpx.get(f"{running.url}/a%0Aforged%20line%1b[31m%E2%80%A8")
        running.post("/v1/chat/completions", model=NAME, user="a\nb", **CHAT)
        until = time.monotonic() + 5  # the line is written after the answer is
        while len(caplog.records) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    lines = [record.getMessage() for record in caplog.records if record.name == "gemmakit.access"]
    assert len(lines) == 2
    assert all(len(line.splitlines()) == 1 and line.isprintable() for line in lines)
    assert "34 + 58" not in "".join(lines)
    if kind == "json":
        assert json.loads(lines[1])["completion_tokens"] == 4 and json.loads(lines[1])["finish_reason"] == "length"


def test_the_document_says_which_statuses_there_are(server: Running):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    for operations in paths.values():
        for operation in operations.values():
            assert {"200", "400", "401", "403", "413", "429", "500", "503"} <= set(operation["responses"])
            assert "422" not in operation["responses"]
    assert "text/event-stream" in paths["/v1/messages"]["post"]["responses"]["200"]["content"]
