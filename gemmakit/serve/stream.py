"""Answers on their way out: whole or as server-sent events, given up as soon as the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemmakit.serve.generation import Answers
from gemmakit.serve.refusals import Refusal, refusal_of

T = TypeVar("T")
# What a document says of a route whose answers may be streamed.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
DONE = "data: [DONE]\n\n"


def line(data: Any, event: str | None = None) -> str:
    """One server-sent event."""
    named = "" if event is None else f"event: {event}\n"
    return f"{named}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def left(receive: Receive) -> None:
    """Back once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_there(request: Request, answers: Answers, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. The answers end if the client goes first, which raises Refusal 499 that nobody reads."""
    watch, task = asyncio.ensure_future(left(request.receive)), asyncio.ensure_future(work)
    dropped = asyncio.ensure_future(answers.outbox.dropped.wait())
    try:
        await asyncio.wait({watch, task, dropped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refusal(499, "the client left.")
    finally:
        answers.leave()
        await _end(watch, task, dropped)


class EventStream(Response):
    """Sends lines as they come, and a comment where there are none for a while.

    Ends the answers when the client leaves, or reads so slowly that too many events wait for it. What goes wrong in
    mid-stream is an event of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], answers: Answers, heartbeat_s: float, error_event: str | None = None):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.lines, self.answers, self.heartbeat_s, self.error_event = lines, answers, heartbeat_s, error_event
        self._sent = False  # anything since the last heartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            tasks = [
                asyncio.ensure_future(work)
                for work in (self._write(send), left(receive), self.answers.outbox.dropped.wait())
            ]
            beat = asyncio.ensure_future(self._beat(send))
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                self._note(scope, tasks)
            finally:
                await _end(*tasks, beat)
            if tasks[0].done() and not tasks[0].cancelled():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.answers.leave()

    async def _write(self, send: Send) -> None:
        try:
            async for text in self.lines:
                await self._send(send, text)
        except Exception as error:
            await self._send(send, line(refusal_of(error).body, self.error_event))

    async def _send(self, send: Send, text: str) -> None:
        self._sent = True
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def _beat(self, send: Send) -> None:
        while True:
            self._sent = False
            await asyncio.sleep(self.heartbeat_s)
            if not self._sent:
                await self._send(send, ": still here\n\n")

    def _note(self, scope: Scope, tasks: Sequence[asyncio.Future[Any]]) -> None:
        if not tasks[0].done():
            scope.setdefault("state", {})["ended"] = "left" if tasks[1].done() else "slow reader"


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
