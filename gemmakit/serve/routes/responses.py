"""POST /v1/responses: OpenAI's newer dialect of a chat. Nothing is kept: each request says all there is to know."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gemmakit.serve import protocol
from gemmakit.serve.conversation import Call, Part, ToolChoice, thinks_by_effort
from gemmakit.serve.generation import Answers
from gemmakit.serve.protocol import (
    AllowedChoice,
    AllowedTools,
    CalledFunction,
    FlatAllowedChoice,
    FlatNamedTool,
    FlatTool,
    Function,
    InputItem,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ResponsesRequest,
    Tool,
    ToolCall,
)
from gemmakit.serve.refusals import Refusal, refusal_of
from gemmakit.serve.service import service_of
from gemmakit.serve.stream import STREAMED, EventStream, line, while_there
from gemmakit.text.response import Thought

router = APIRouter(tags=["openai"])
# Parts of a message that are text, whoever said it.
TEXTS = ("text", "input_text", "output_text")


@router.post("/v1/responses", responses=STREAMED)
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    served = service.ready(body.model)
    service.count_unknown(body)
    _refuse(body)
    answers = await service.chat(
        request,
        body,
        _messages(body),
        tools=_tools(body.tools),
        tool_choice=_choice(body),
        parallel=body.parallel_tool_calls is not False,
        thinks=None if body.reasoning is None else thinks_by_effort(body.reasoning.effort),
        max_tokens=body.max_output_tokens,
        stop=body.stop,
        response_format=_format(body),
    )
    head = _head(body, served.name)
    if body.stream:
        return EventStream(_events(answers, head), answers, service.settings.heartbeat_s, "error")
    await while_there(request, answers, answers.finish())
    items = _Items()
    for part in answers.choices[0].parts:
        items.add(part)
    return JSONResponse(_ended(head, items, answers))


def _refuse(body: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation", "background", "prompt"):
        if getattr(body, name):
            said = f"{name} cannot be honoured: responses are not kept. Send the whole conversation as input."
            raise Refusal(400, said, param=name, code="unsupported")
    if body.top_logprobs:
        said = "top_logprobs cannot be honoured here: ask /v1/chat/completions."
        raise Refusal(400, said, param="top_logprobs", code="unsupported")


# -- to a conversation -------------------------------------------------------------------------------------------------


def _messages(body: ResponsesRequest) -> list[Message]:
    found = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*found, Message(role="user", content=body.input)]
    thought = ""
    for place, item in enumerate(body.input):
        if item.type == "reasoning":
            thought += "".join(part.text or "" for part in item.content or () if isinstance(part, protocol.Part))
            continue
        message = _message(item, place)
        if message.role == "assistant" and thought:
            message.reasoning = thought
        thought = ""  # of the turn it stands in, not of a later one
        last = found[-1] if found else None
        # Calls are items of their own, and yet of the turn in which they were made.
        if message.tool_calls and not message.reasoning and last is not None and last.role == "assistant":
            last.tool_calls = [*(last.tool_calls or ()), *message.tool_calls]
        else:
            found.append(message)
    return found


def _choice(body: ResponsesRequest) -> ToolChoice:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    if isinstance(choice, FlatAllowedChoice):
        allowed = AllowedTools(mode=choice.mode, tools=[_named(tool) for tool in choice.tools])
        return AllowedChoice(type="allowed_tools", allowed_tools=allowed)
    return _named(choice)


def _named(tool: FlatNamedTool) -> NamedTool:
    return NamedTool(type="function", function=NamedFunction(name=tool.name))


def _message(item: InputItem, place: int) -> Message:
    if item.type == "function_call_output":
        return Message(role="tool", content=_texts(item.output), tool_call_id=item.call_id)
    if item.type == "function_call":
        function = CalledFunction(name=item.name or "", arguments=item.arguments or "{}")
        return Message(role="assistant", tool_calls=[ToolCall(id=item.call_id, function=function)])
    if item.role is None:
        raise Refusal(400, f"input[{place}] is a message without a role.", param=f"input[{place}].role")
    return Message(role=item.role, content=_texts(item.content))


def _texts(content: str | list[protocol.Part] | None) -> str | list[protocol.Part] | None:
    if not isinstance(content, list):
        return content
    return [protocol.Part(type="text", text=part.text) if part.type in TEXTS else part for part in content]


def _tools(tools: Sequence[FlatTool] | None) -> list[Tool] | None:
    if tools is None:
        return None
    return [
        Tool(type="function", function=Function(name=t.name, description=t.description, parameters=t.parameters))
        for t in tools
    ]


def _format(body: ResponsesRequest) -> ResponseFormat | None:
    asked = None if body.text is None else body.text.format
    return None if asked is None else ResponseFormat(type=asked.type, json_schema=asked)


# -- from an answer ----------------------------------------------------------------------------------------------------


def _head(body: ResponsesRequest, name: str) -> dict[str, Any]:
    """A response before anything is said."""
    choice = body.tool_choice
    return {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": body.model or name,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True),
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "truncation": "disabled",
        "usage": None,
    }


# Items that grow piece by piece: what begins their id, and what their one part is called.
_GROWS = {"message": ("msg", "output_text"), "reasoning": ("rs", "reasoning_text")}


class _Items:
    """The output as it grows: messages, thoughts, and calls between them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.open = False  # whether the last one goes on

    def add(self, part: Part) -> dict[str, Any] | None:
        """The item that begins with this part, or None where it goes on with the last."""
        if isinstance(part, Call):
            self.open = False
            call = {"call_id": part.id, "name": part.name, "arguments": part.json_arguments}
            return self._begin("fc", {"type": "function_call", **call})
        kind, text = ("reasoning", part.text) if isinstance(part, Thought) else ("message", part)
        if self.open and self.items[-1]["type"] == kind:
            self.items[-1]["content"][0]["text"] += text
            return None
        self.open = True
        prefix, name = _GROWS[kind]
        content: dict[str, Any] = {"type": name, "text": text}
        if kind == "message":
            content |= {"annotations": [], "logprobs": []}
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        return self._begin(prefix, {"type": kind, **more, "content": [content]})

    def _begin(self, prefix: str, item: dict[str, Any]) -> dict[str, Any]:
        self.items.append({"id": f"{prefix}_{secrets.token_hex(12)}", "status": "completed", **item})
        return self.items[-1]


def _ended(head: dict[str, Any], items: _Items, answers: Answers) -> dict[str, Any]:
    usage = answers.usage
    told = {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
    whole = {**head, "status": "completed", "output": items.items, "usage": told}
    if answers.choices[0].finish_reason == "length":
        whole |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return whole


async def _events(answers: Answers, head: dict[str, Any]) -> AsyncIterator[str]:
    """The events in OpenAI's order, numbered."""
    count = -1

    def event(kind: str, data: dict[str, Any]) -> str:
        nonlocal count
        count += 1
        return line({"type": kind, "sequence_number": count, **data}, kind)

    yield event("response.created", {"response": head})
    yield event("response.in_progress", {"response": head})
    items = _Items()
    try:
        async for choice, _ in answers:
            for said in (said for part in choice.fresh for said in _told(items, part)):
                yield event(*said)
    except Exception as error:
        failure = refusal_of(error)
        told = {"code": failure.code or "server_error", "message": failure.detail}
        yield event("response.failed", {"response": {**head, "status": "failed", "error": told}})
        return
    if items.open:
        for said in _done(items.items[-1], len(items.items) - 1):
            yield event(*said)
    whole = _ended(head, items, answers)
    yield event(f"response.{whole['status']}", {"response": whole})


Said = tuple[str, dict[str, Any]]


def _told(items: _Items, part: Part) -> Iterator[Said]:
    """What a new part of the answer is told by: an item that ends, one that begins, its delta."""
    was_open = items.open
    began = items.add(part)
    place = len(items.items) - 1
    if began is not None:
        if was_open:
            yield from _done(items.items[place - 1], place - 1)
        yield from _begun(began, place)
    kind, delta = _delta(part)
    yield kind, {"item_id": items.items[-1]["id"], "output_index": place, **delta}
    if not items.open:
        yield from _done(items.items[-1], place)


def _delta(part: Part) -> Said:
    if isinstance(part, Call):
        return "response.function_call_arguments.delta", {"delta": part.json_arguments}
    if isinstance(part, Thought):
        return "response.reasoning_text.delta", {"content_index": 0, "delta": part.text}
    return "response.output_text.delta", {"content_index": 0, "delta": part, "logprobs": []}


def _begun(item: dict[str, Any], place: int) -> list[Said]:
    """That an item begins, empty."""
    if item["type"] not in _GROWS:
        empty = {**item, "status": "in_progress", "arguments": ""}
        return [("response.output_item.added", {"output_index": place, "item": empty})]
    where = {"item_id": item["id"], "output_index": place, "content_index": 0}
    return [
        (
            "response.output_item.added",
            {"output_index": place, "item": {**item, "status": "in_progress", "content": []}},
        ),
        ("response.content_part.added", {**where, "part": {**item["content"][0], "text": ""}}),
    ]


def _done(item: dict[str, Any], place: int) -> list[Said]:
    """That an item is whole."""
    last = ("response.output_item.done", {"output_index": place, "item": item})
    where = {"item_id": item["id"], "output_index": place}
    if item["type"] not in _GROWS:
        told = {**where, "name": item["name"], "arguments": item["arguments"]}
        return [("response.function_call_arguments.done", told), last]
    part = item["content"][0]
    where["content_index"] = 0
    scores = {"logprobs": []} if item["type"] == "message" else {}
    return [
        (f"response.{part['type']}.done", {**where, "text": part["text"], **scores}),
        ("response.content_part.done", {**where, "part": part}),
        last,
    ]
