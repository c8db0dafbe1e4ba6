"""The application: routes, and around them who may ask, and how much; and how it is asked from within its process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Scope

from gemmakit import __version__
from gemmakit.serve import page
from gemmakit.serve.access_log import AccessLog
from gemmakit.serve.batch_format import Row
from gemmakit.serve.feeder import Feeder
from gemmakit.serve.refusals import TYPES, ErrorBody, answer_errors
from gemmakit.serve.routes import batches, chat, completions, embeddings, files, messages, responses, status, tokens
from gemmakit.serve.service import Service
from gemmakit.serve.tracing import Tracing, find_tracer
from gemmakit.serve.trust import Bodies, Keys, Origins

ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    messages.router,
    embeddings.router,
    tokens.router,
    files.router,
    batches.router,
    status.router,
    page.router,
)
ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorBody} for code in TYPES if code != 405}


class App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The document, without FastAPI's own 422 for what is 400 here."""
        document = super().openapi()
        for operation in (one for path in document["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)
        return document


def bare_app(service: Service) -> FastAPI:
    """The routes of one model alone, for who is inside already. 503 until `service.load` is through."""
    # Its own pages of documentation load scripts from other sites; /openapi.json is there.
    app = App(title="gemmakit", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS, lifespan=_feeding)
    app.state.service = service
    answer_errors(app)
    for router in ROUTERS:
        app.include_router(router)
    if (tracer := find_tracer()) is not None:
        app.add_middleware(Tracing, tracer=tracer, service=service)
    return app


def create_app(service: Service) -> FastAPI:
    """The server of one model, as an ASGI application: its routes, and around them who may ask."""
    app, settings = bare_app(service), service.settings
    # The last is the outermost.
    app.add_middleware(Bodies, settings=settings, larger=[(files.PATH, settings.max_upload_bytes)])
    app.add_middleware(Keys, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Origins, settings=settings)
    app.add_middleware(AccessLog, log_format=settings.log_format)
    return app


async def ask(app: ASGIApp, path: str, body: Mapping[str, Any], **state: Any) -> tuple[int, Mapping[str, Any]]:
    """POST a body to a path from within the process, the very way a client's would take: a row of a batch.

    Gives status and body of the answer, which is an object of JSON. state: of the request. Cancelled, it is a client
    that left.
    """
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "client": None,
        "server": ("localhost", 0),
        "state": state,
    }
    unread = [json.dumps(body).encode()]
    status, pieces = 0, list[bytes]()

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await asyncio.Future()  # whoever asks stays until the answer is there

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        pieces.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        if not status:  # else it was answered, and logged by whoever answered
            raise
    return status, json.loads(b"".join(pieces))


@asynccontextmanager
async def _feeding(app: FastAPI) -> AsyncGenerator[None, None]:
    """Works off stored batches for as long as the application runs, where there is a store."""
    service: Service = app.state.service
    if service.store is None:
        yield
        return
    inner = bare_app(service)  # what asks from within shows no key

    async def answer(owner: str, row: Row) -> tuple[int, Mapping[str, Any]]:
        return await ask(inner, row.url, row.body, owner=owner)

    service.feeder = Feeder(service.store, answer, service.has_room, service.settings.batch_rows)
    task = asyncio.ensure_future(service.feeder.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        service.store.close()
