"""OpenTelemetry spans of what is asked of the model: one a request, and beneath it what each answer's time went to.

Names are those of the semantic conventions for generative AI. Nothing of what was asked or answered is in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemmakit import __version__
from gemmakit.errors import MissingDependency
from gemmakit.serve.generation import Answers
from gemmakit.serve.service import Service

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
# Settings of a request and what they are called in a span.
ASKED = {
    "max_new_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
}


def export_to(endpoint: str) -> Callable[[], None]:
    """Send the spans of this process to a collector, by OTLP over HTTP; called, what is given sends the last of them.

    endpoint: http://HOST:4318/v1/traces. Raises MissingDependency without the extra `otel`.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        said = f"--otlp-traces-endpoint needs the package {error.name}: pip install 'gemmakit[otel]'."
        raise MissingDependency(said) from None
    resource = Resource.create()  # with what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "gemmakit"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def find_tracer() -> Tracer | None:
    """The tracer of whoever set OpenTelemetry up in this process; None where nobody has."""
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        return None
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return trace.get_tracer("gemmakit.serve", __version__)


class Tracing:
    """Spans around the routes that ask the model.

    Each is a child of the span that the web framework has open for the request, where it traces too (FastAPI does by
    itself, or by OpenTelemetry's instrumentation); else it is the server's span, a child of what the request's
    `traceparent` names.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer, service: Service):
        self.app, self.tracer, self.service = app, tracer, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = OPERATIONS.get(scope["path"]) if scope["type"] == "http" else None
        if operation is None or self.service.model is None:
            await self.app(scope, receive, send)
            return
        begun, state = Begun(), scope.setdefault("state", {})
        span, status = self._span(operation, self.service.model.name, scope, begun), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            status = status or 500  # whoever answers it stands around this
            raise
        finally:
            self._end(span, status or 499, state, begun)  # without an answer: its client left

    def _span(self, operation: str, model: str, scope: Scope, begun: Begun) -> Span:
        from opentelemetry.context import get_current
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, get_current_span

        within = get_current_span().get_span_context().is_valid
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        known = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "gemmakit",
            "gen_ai.request.model": model,
            "http.request.method": scope["method"],
            "http.route": scope["path"],
        }
        context, kind = (get_current(), SpanKind.INTERNAL) if within else (extract(headers), SpanKind.SERVER)
        return self.tracer.start_span(f"{operation} {model}", context, kind, attributes=known, start_time=begun.time_ns)

    def _end(self, span: Span, status: int, state: Mapping[str, Any], begun: Begun) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        answers: Answers | None = state.get("answers")
        reasons = [] if answers is None else [choice.finish_reason for choice in answers.choices]
        failed = "error" if "error" in reasons else str(status) if status >= 400 else state.get("ended")
        span.set_attribute("http.response.status_code", status)
        if answers is not None:
            span.set_attributes(_told(answers))
            context = set_span_in_context(span)
            for answer in range(len(answers.choices)):
                for name, start_s, end_s in _spent(answers, answer):
                    child = self.tracer.start_span(
                        name, context, start_time=begun.at(start_s), attributes={"gemmakit.answer": answer}
                    )
                    child.end(begun.at(end_s))
        if failed is not None:
            span.set_attribute("error.type", failed)
        if failed == "error" or status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(begun.at(time.monotonic()))


class Begun:
    """A moment by both clocks, so that no span is longer or shorter because the wall's was set."""

    def __init__(self) -> None:
        self.time_ns, self._monotonic = time.time_ns(), time.monotonic()

    def at(self, monotonic: float) -> int:
        """The wall clock's nanoseconds of a moment of the monotonic one."""
        return self.time_ns + round((monotonic - self._monotonic) * 1e9)


def _told(answers: Answers) -> dict[str, Any]:
    """What was asked, in numbers, and what it took."""
    request, usage = answers.jobs[0].request, answers.usage
    told = {name: request.settings[key] for key, name in ASKED.items() if request.settings.get(key) is not None}
    if request.n > 1:
        told["gen_ai.request.choice.count"] = request.n
    first = answers.choices[0].usage
    if first is not None and first.first_token_s is not None:
        told["gen_ai.response.time_to_first_chunk"] = first.first_token_s
    return told | {
        "gen_ai.response.finish_reasons": [choice.finish_reason or "left" for choice in answers.choices],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
    }


def _spent(answers: Answers, answer: int) -> list[tuple[str, float, float]]:
    """What an answer's time went to, one after another: names, begins and ends by the monotonic clock."""
    usage, begun = answers.choices[answer].usage, answers.begun
    if usage is None:  # its client left
        return []
    ends = {"queue": usage.queued_s, "prefill": usage.first_token_s, "decode": usage.total_s}
    found: list[tuple[str, float, float]] = []
    last = begun
    for name, end_s in ends.items():
        if end_s is None:  # it ended without a token
            break
        found.append((name, last, begun + end_s))
        last = begun + end_s
    return found
