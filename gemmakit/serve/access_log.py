"""One line a request, as text or JSON, without a word of what was asked or answered."""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("gemmakit.access")
MAX_PATH = 200


class AccessLog:
    """Writes the line when a request has ended, and gives its answer an x-request-id that is in the line too."""

    def __init__(self, app: ASGIApp, log_format: str):
        self.app, self.log_format = app, log_format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, state = time.monotonic(), scope.setdefault("state", {})
        line: dict[str, Any] = {"id": f"req_{secrets.token_hex(8)}", "method": scope["method"]}
        line |= {"path": scope["path"][:MAX_PATH], "status": 499}  # unless there is an answer

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", line["id"].encode())]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            line["seconds"] = round(time.monotonic() - begun, 4)
            log.info(_written({**line, **_told(state)}, self.log_format))


def _told(state: dict[str, Any]) -> dict[str, Any]:
    """What the answers took, where there were any."""
    answers = state.get("answers")
    if answers is None:
        return {}
    usage, first = answers.usage, answers.choices[0].usage
    told = {
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "finish_reason": state.get("ended") or ",".join(sorted({c.finish_reason or "left" for c in answers.choices})),
    }
    if first is not None:
        told |= {
            "queued_s": round(first.queued_s, 4),
            "first_token_s": first.first_token_s and round(first.first_token_s, 4),
        }
    return told


def _written(line: dict[str, Any], log_format: str) -> str:
    """One line whatever is in it: what could end a line, or colour one, is spelled out."""
    if log_format == "json":
        return json.dumps({"time": round(time.time(), 3), **line})
    shown = {name: json.dumps(value).strip('"') for name, value in line.items() if value is not None}
    head = " ".join(shown.pop(name) for name in ("method", "path", "status"))
    return f"{head} {' '.join(f'{name}={value}' for name, value in shown.items())}"


def write_to_stderr() -> None:
    """Let the server's own lines be seen, here and nowhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("gemmakit.access", "gemmakit.serve"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers, logger.propagate = [handler], False
