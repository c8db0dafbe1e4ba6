"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect of a chat."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gemmakit.serve.conversation import Call
from gemmakit.serve.generation import Answers, Choice
from gemmakit.serve.protocol import (
    AnthropicChoice,
    AnthropicTool,
    Block,
    CalledFunction,
    CountRequest,
    Function,
    Message,
    MessagesRequest,
    Part,
    Tool,
    ToolCall,
    Turn,
)
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.served import ServedModel
from gemmakit.serve.service import service_of
from gemmakit.serve.stream import STREAMED, EventStream, line, while_there

router = APIRouter(tags=["anthropic"])
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@router.post("/v1/messages", responses=STREAMED)
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    served = service.ready(body.model)
    service.count_unknown(body)
    choice = body.tool_choice
    answers = await service.chat(
        request,
        body,
        _messages(body),
        tools=_tools(body.tools),
        tool_choice=_choice(choice),
        parallel=choice is None or not choice.disable_parallel_tool_use,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
    )
    head: dict[str, Any] = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": body.model or served.name,
    }
    stops = body.stop_sequences or []
    if body.stream:
        return EventStream(_events(served, answers, head, stops), answers, service.settings.heartbeat_s, "error")
    (said,) = await while_there(request, answers, answers.finish())
    return JSONResponse({**head, "content": _blocks(said), **_end(served, said, stops), "usage": _usage(answers)})


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
    """How many tokens a conversation is."""
    service = service_of(request)
    service.ready(body.model)
    service.count_unknown(body)
    prompt, _ = await service.prompt(_messages(body), _tools(body.tools), _choice(body.tool_choice))
    return {"input_tokens": len(prompt)}


# -- to a conversation -------------------------------------------------------------------------------------------------


def _messages(body: CountRequest) -> list[Message]:
    found = [] if body.system is None else [Message(role="system", content=body.system)]
    for place, turn in enumerate(body.messages):
        found += (
            [Message(role=turn.role, content=turn.content)] if isinstance(turn.content, str) else _turn(turn, place)
        )
    return found


def _turn(turn: Turn, place: int) -> list[Message]:
    """A turn's blocks: what came of calls first, then what is said and called."""
    found: list[Message] = []
    said: list[Part] = []
    calls: list[ToolCall] = []
    for block in turn.content:
        assert isinstance(block, Block)
        if block.type == "tool_result":
            found.append(Message(role="tool", content=block.content, tool_call_id=block.tool_use_id))
        elif block.type == "tool_use":
            arguments = json.dumps(block.input or {})
            calls.append(ToolCall(id=block.id, function=CalledFunction(name=block.name or "", arguments=arguments)))
        elif block.type == "text":
            said.append(Part(type="text", text=block.text or ""))
        elif block.type not in ("thinking", "redacted_thinking"):  # what a model thought is not said again
            said_ = f"messages[{place}] holds a block of type {block.type!r:.80}, but gemmakit reads text only."
            raise Refusal(400, said_, param=f"messages[{place}].content")
    if said or calls or not found:
        found.append(Message(role=turn.role, content=said or "", tool_calls=calls or None))
    return found


def _tools(tools: Sequence[AnthropicTool] | None) -> list[Tool] | None:
    if tools is None:
        return None
    return [
        Tool(type="function", function=Function(name=t.name, description=t.description, parameters=t.input_schema))
        for t in tools
    ]


def _choice(choice: AnthropicChoice | None) -> str | None:
    if choice is None:
        return None
    return {"any": "required", "tool": "required"}.get(choice.type, choice.type)


# -- from an answer ----------------------------------------------------------------------------------------------------


def _end(served: ServedModel, choice: Choice, stops: Sequence[str]) -> dict[str, Any]:
    stop = _stop(served, choice, stops)
    reason = REASONS.get(choice.finish_reason or "", "end_turn")
    return {"stop_reason": "stop_sequence" if stop is not None else reason, "stop_sequence": stop}


def _stop(served: ServedModel, choice: Choice, stops: Sequence[str]) -> str | None:
    """The stop text that ended an answer: what its tokens say after all that was told of them."""
    if not stops or choice.events[-1].finish_reason != "stop":
        return None
    tokens = [event.token for event in choice.events if event.token is not None]
    told = sum(len(event.text) for event in choice.events)
    rest = served.tokenizer.decode(tokens, skip_special_tokens=True)[told:]
    return next((stop for stop in stops if rest.startswith(stop)), None)


def _usage(answers: Answers) -> dict[str, Any]:
    told = answers.usage
    cached = told["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": told["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": told["completion_tokens"],
    }


def _block(part: str | Call) -> dict[str, Any]:
    if isinstance(part, Call):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": part.arguments}
    return {"type": "text", "text": part}


def _blocks(choice: Choice) -> list[dict[str, Any]]:
    """Pieces of text that follow one another are one block."""
    found: list[dict[str, Any]] = []
    for part in choice.parts:
        if isinstance(part, str) and found and found[-1]["type"] == "text":
            found[-1]["text"] += part
        else:
            found.append(_block(part))
    return found


async def _events(
    served: ServedModel, answers: Answers, head: dict[str, Any], stops: Sequence[str]
) -> AsyncIterator[str]:
    """A block is begun, grows by deltas and is ended; then comes why the message ended."""

    def event(kind: str, **data: Any) -> str:
        return line({"type": kind, **data}, kind)

    begun = {**head, "content": [], "stop_reason": None, "stop_sequence": None}
    yield event("message_start", message={**begun, "usage": {"input_tokens": 0, "output_tokens": 0}})
    place, open_ = -1, False  # the newest block, and whether it is text that goes on
    async for choice, _ in answers:
        for part in choice.fresh:
            text = isinstance(part, str)
            if open_ and not text:
                yield event("content_block_stop", index=place)
            if not (open_ and text):
                place += 1
                empty = {"text": ""} if text else {"input": {}}
                yield event("content_block_start", index=place, content_block={**_block(part), **empty})
            open_ = text
            if isinstance(part, str):
                yield event("content_block_delta", index=place, delta={"type": "text_delta", "text": part})
            else:
                delta = {"type": "input_json_delta", "partial_json": part.json_arguments}
                yield event("content_block_delta", index=place, delta=delta)
                yield event("content_block_stop", index=place)
    if open_:
        yield event("content_block_stop", index=place)
    yield event("message_delta", delta=_end(served, answers.choices[0], stops), usage=_usage(answers))
    yield event("message_stop")
