"""A request to the application from within its own process: a row of a batch takes the very way a client's would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Scope


async def ask(app: ASGIApp, path: str, body: Mapping[str, Any], **state: Any) -> tuple[int, Mapping[str, Any]]:
    """POST a body to a path; status and body of the answer, which is an object of JSON. state: of the request.

    Cancelled, it is a client that left.
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
