"""OpenTelemetry: a span a request and what its time went to, under the field's names; nothing where nobody asked."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, http_attributes
from opentelemetry.semconv.attributes import error_attributes
from opentelemetry.trace import SpanKind, StatusCode
from running_server import NAME, Running, serving
from starlette.applications import Starlette
from test_serve_faults import begin, slow, wait_for
from test_serve_process import address, start

from gemmakit.serve import tracing
from gemmakit.serve.service import Service
from gemmakit.serve.settings import ServeSettings

SECRET = "a secret question"


class Collected:
    """What a server's spans were, by what was asked."""

    def __init__(self, server: Running, exporter: InMemorySpanExporter):
        self.server, self.exporter = server, exporter

    def all(self, ask: Any) -> list[ReadableSpan]:
        """Every span of a request, the web framework's too; that of the server itself may end before or after ours."""
        self.exporter.clear()
        ask()

        def ended() -> bool:
            spans = self.exporter.get_finished_spans()
            return any(is_request(span) for span in spans) and any(span.kind == SpanKind.SERVER for span in spans)

        assert wait_for(ended)
        spans = list(self.exporter.get_finished_spans())
        assert SECRET not in "".join(span.to_json() for span in spans)
        return spans

    def of(self, ask: Any) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """A request's span and its children by their begins."""
        ours = [span for span in self.all(ask) if span.instrumentation_scope.name == "gemmakit.serve"]
        (request,) = filter(is_request, ours)
        children = [span for span in ours if span is not request]
        assert all(child.parent.span_id == request.context.span_id for child in children)
        return request, sorted(children, key=lambda span: (span.attributes["gemmakit.answer"], span.start_time))


def is_request(span: ReadableSpan) -> bool:
    return "gen_ai.operation.name" in span.attributes


@pytest.fixture(scope="module")
def traced() -> Iterator[Collected]:
    """A server whose process has a tracer provider, as an application around it would set one."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:  # the API lets a process set its provider once only
        patch.setattr(trace, "get_tracer_provider", lambda: provider)
        with serving(max_batch_size=2) as server:
            yield Collected(server, exporter)


def names_of(*modules: Any) -> set[str]:
    return {value for module in modules for value in vars(module).values() if isinstance(value, str)}


def test_names_are_those_of_the_conventions(traced: Collected):
    asked = {"prompt": SECRET, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 9, "seed": 1, "n": 2}
    span, children = traced.of(lambda: traced.server.post("/v1/completions", **asked))
    known = names_of(gen_ai_attributes, http_attributes, error_attributes)
    assert set(span.attributes) <= known
    assert set(tracing.ASKED.values()) <= set(span.attributes)
    operations = {one.value for one in gen_ai_attributes.GenAiOperationNameValues}
    assert set(tracing.OPERATIONS.values()) <= operations
    assert {name for child in children for name in child.attributes} == {"gemmakit.answer"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_s_time_is_queue_prefill_and_decode_without_a_gap(traced: Collected, stream: bool):
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 6, "ignore_eos": True, "temperature": 0}
    span, children = traced.of(lambda: traced.server.post("/v1/chat/completions", **body, stream=stream, n=3))
    assert span.name == f"chat {NAME}" and span.status.status_code == StatusCode.UNSET
    told = dict(span.attributes)
    assert told["gen_ai.usage.output_tokens"] == 18 and told["gen_ai.usage.input_tokens"] > 5
    assert told["gen_ai.response.finish_reasons"] == ("length",) * 3 and told["gen_ai.request.choice.count"] == 3
    assert told["http.response.status_code"] == 200 and told["http.route"] == "/v1/chat/completions"
    assert [child.name for child in children] == ["queue", "prefill", "decode"] * 3
    for answer in range(3):
        queue, prefill, decode = children[3 * answer : 3 * answer + 3]
        assert queue.end_time == prefill.start_time and prefill.end_time == decode.start_time
        moments = [span.start_time, queue.start_time, prefill.start_time, decode.start_time, decode.end_time]
        assert moments == sorted(moments)
    # Two run at a time: the third answer waits for as long as one of the others is made.
    waited = [children[3 * answer].end_time - children[3 * answer].start_time for answer in range(3)]
    assert waited[2] > max(waited[:2])


@pytest.mark.parametrize("framework", [True, False])
def test_a_request_has_one_server_span_which_is_the_child_of_the_caller_s(
    traced: Collected, monkeypatch: pytest.MonkeyPatch, framework: bool
):
    """framework: whether FastAPI traces by itself, as later versions do."""
    if not framework:
        monkeypatch.setattr(FastAPI, "__call__", Starlette.__call__)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    url, body = f"{traced.server.url}/v1/completions", {"prompt": "x", "max_tokens": 1}
    spans = traced.all(lambda: httpx.post(url, json=body, headers={"traceparent": parent}))
    assert {f"{span.context.trace_id:032x}" for span in spans} == {parent.split("-")[1]}
    (server,) = [span for span in spans if span.kind == SpanKind.SERVER]
    assert f"{server.parent.span_id:016x}" == parent.split("-")[2]
    (ours,) = filter(is_request, spans)
    assert ours is server or ours.parent.span_id == server.context.span_id
    odd = {"traceparent": "nonsense\u00e9".encode("latin-1")}
    spans = traced.all(lambda: httpx.post(url, json=body, headers=odd))
    assert [span.parent for span in spans if span.kind == SpanKind.SERVER] == [None]


def test_what_was_refused_and_who_left_say_so(traced: Collected):
    span, children = traced.of(lambda: traced.server.post("/v1/completions", prompt=SECRET, temperature=-1))
    assert (span.attributes["http.response.status_code"], span.attributes["error.type"]) == (400, "400")
    assert span.status.status_code == StatusCode.UNSET and not children  # a client's mistake is none of the server's

    def leave() -> None:
        made = begin(traced.server, prompt=SECRET, max_tokens=400, ignore_eos=True, stream=True)
        assert wait_for(lambda: traced.server.service.worker.engine.stats().running == 1)
        made.close()

    with slow(traced.server):
        span, _ = traced.of(leave)
    assert span.attributes["error.type"] == "left" and span.attributes["gen_ai.response.finish_reasons"] == ("left",)


def test_what_nobody_expected_is_the_server_s_error(traced: Collected):
    async def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    made = tracing.Tracing(broken, tracing.find_tracer(), traced.server.service)
    scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
    traced.exporter.clear()
    with pytest.raises(RuntimeError):
        asyncio.run(made(scope, None, None))
    (span,) = traced.exporter.get_finished_spans()
    assert (span.attributes["http.response.status_code"], span.attributes["error.type"]) == (500, "500")
    assert span.status.status_code == StatusCode.ERROR


def test_only_what_asks_the_model_is_traced(traced: Collected):
    traced.exporter.clear()
    for path in ("/health", "/metrics", "/v1/models", "/"):
        assert httpx.get(f"{traced.server.url}{path}").status_code == 200
    assert traced.server.post("/tokenize", prompt="x").status_code == 200
    assert not [span for span in traced.exporter.get_finished_spans() if is_request(span)]
    span, _ = traced.of(lambda: traced.server.post("/v1/embeddings", input="x", pooling="mean"))
    assert span.name == f"embeddings {NAME}"


def test_clocks_that_are_set_make_no_span_longer_or_negative(monkeypatch: pytest.MonkeyPatch):
    begun = tracing.Begun()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert 0 <= begun.at(time.monotonic()) - begun.time_ns < 10**10


def test_without_a_provider_nothing_is_in_the_way(monkeypatch: pytest.MonkeyPatch):
    from gemmakit.serve.app import bare_app

    def traces() -> bool:
        return tracing.Tracing in [layer.cls for layer in bare_app(Service(ServeSettings())).user_middleware]

    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)  # what there is until one is set
    assert tracing.find_tracer() is None and not traces()
    monkeypatch.setattr(trace, "get_tracer_provider", TracerProvider)
    assert traces()
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # as where it is not installed
    assert tracing.find_tracer() is None


@pytest.mark.skipif(importlib.util.find_spec("opentelemetry.exporter") is None, reason="needs gemmakit[otel]")
def test_spans_arrive_where_the_endpoint_says_the_last_at_the_end():
    arrived: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    options = {"OTEL_EXPORTER_OTLP_COMPRESSION": "none", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test"}
    process = start("--port", 0, "--otlp-traces-endpoint", endpoint, **options)
    try:
        url = address(process)
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=60).status_code == 200
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
        collector.shutdown()
    (resource,) = [one for data in arrived for one in ExportTraceServiceRequest.FromString(data).resource_spans]
    named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert named["service.name"] == "gemmakit" and named["deployment.environment"] == "test"
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert {"text_completion gemmakit-demo", "queue", "prefill", "decode"} <= set(names)
