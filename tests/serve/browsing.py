"""A real Chromium, and a server of the page whose answers a test chooses."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gemmakit.serve.page import router

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
Chunk = dict[str, Any]


@dataclass
class Script:
    """What a server says. By question: answers (the text), after which a `fault` may come; `pause_s` between pieces.

    asked: the bodies of the requests that came; left: how many callers went before the end.
    """

    answers: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    refusals: list[Response] = field(default_factory=list)
    extra: dict[str, list[Chunk]] = field(default_factory=dict)
    pause_s: float = 0.0
    capabilities: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(router)

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            return {
                "object": "list",
                "data": [{"id": "scripted", "object": "model", "capabilities": self.capabilities}],
            }

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            if self.refusals:
                return self.refusals.pop(0)
            body = await request.json()
            self.asked.append(body)
            return StreamingResponse(self.stream(body), media_type="text/event-stream")

        return app

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        question = body["messages"][-1]["content"]
        pieces = re.findall(r"\n|[ \t]*[^\s]{1,6}|[ \t]+", self.answers.get(question, f"You said {question}."))
        try:
            yield event(delta={"role": "assistant", "content": ""})
            for delta in self.extra.get(question, []):
                yield event(delta=delta)
            for k, piece in enumerate(pieces):
                yield event(delta={"content": piece}, logprobs=scores(piece, k) if body.get("logprobs") else None)
                await asyncio.sleep(self.pause_s)
            if question in self.faults:
                yield self.faults[question]
                return
            yield event(delta={}, finish_reason="stop")
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': len(pieces)}})}\n\n: alive\n\n"
            yield "data: [DONE]\n\n"
        except BaseException:
            self.left += 1
            raise


def event(**choice: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None, **choice}]})}\n\n"


def scores(piece: str, k: int) -> dict[str, Any]:
    """Every fourth token is an unlikely one."""
    p = 0.05 if k % 4 == 3 else 0.97
    others = [(piece, p), (" else", (1 - p) * 0.8)]
    top = [{"token": t, "logprob": math.log(q)} for t, q in sorted(others, key=lambda other: -other[1])]
    return {"content": [{"token": piece, "logprob": math.log(p), "top_logprobs": top}]}


def refusal(status: int, message: str, **headers: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status, headers)


@contextmanager
def scripted(script: Script) -> Iterator[Script]:
    """The script, served on a free port of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(script.app(), log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    script.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    try:
        yield script
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
