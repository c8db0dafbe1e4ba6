"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect of a chat."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gemmakit.serve import protocol
from gemmakit.serve.conversation import Call, Part, ToolChoice, chosen_tools, template_variables
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
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
    Turn,
)
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.served import ServedModel
from gemmakit.serve.service import service_of
from gemmakit.serve.stream import STREAMED, EventStream, line, while_there
from gemmakit.text.response import Thought

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
        thinks=_thinks(body),
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
    served = service.ready(body.model)
    service.count_unknown(body)
    use = chosen_tools(_tools(body.tools), _choice(body.tool_choice), True, served.has_tools)
    prompt = await service.prompt(_messages(body), use, template_variables(None, _thinks(body), served.has_thinking))
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
    said: list[protocol.Part] = []
    calls: list[ToolCall] = []
    thoughts = ""
    for block in turn.content:
        assert isinstance(block, Block)
        if block.type == "tool_result":
            found.append(Message(role="tool", content=block.content, tool_call_id=block.tool_use_id))
        elif block.type == "tool_use":
            arguments = json.dumps(block.input or {})
            calls.append(ToolCall(id=block.id, function=CalledFunction(name=block.name or "", arguments=arguments)))
        elif block.type == "text":
            said.append(protocol.Part(type="text", text=block.text or ""))
        elif block.type == "thinking":
            thoughts += block.thinking or ""
        elif block.type != "redacted_thinking":
            said_ = f"messages[{place}] holds a block of type {block.type!r:.80}, but gemmakit reads text only."
            raise Refusal(400, said_, param=f"messages[{place}].content")
    if said or calls or thoughts or not found:
        answer = Message(role=turn.role, content=said or "", tool_calls=calls or None, reasoning=thoughts or None)
        found.append(answer)
    return found


def _tools(tools: Sequence[AnthropicTool] | None) -> list[Tool] | None:
    if tools is None:
        return None
    return [
        Tool(type="function", function=Function(name=t.name, description=t.description, parameters=t.input_schema))
        for t in tools
    ]


def _choice(choice: AnthropicChoice | None) -> ToolChoice:
    if choice is None:
        return None
    if choice.type == "tool":
        return NamedTool(type="function", function=NamedFunction(name=choice.name or ""))
    return "required" if choice.type == "any" else choice.type


def _thinks(body: CountRequest) -> bool | None:
    return None if body.thinking is None else body.thinking.type != "disabled"


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


def _block(part: Part) -> dict[str, Any]:
    if isinstance(part, Call):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": part.arguments}
    if isinstance(part, Thought):
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    return {"type": "text", "text": part}


def _blocks(choice: Choice) -> list[dict[str, Any]]:
    """Pieces of text, or of a thought, that follow one another are one block."""
    found: list[dict[str, Any]] = []
    for block in map(_block, choice.parts):
        kind = block["type"]
        if kind in _GROWS and found and found[-1]["type"] == kind:
            found[-1][kind] += block[kind]
        else:
            found.append(block)
    return found


# Blocks that grow piece by piece, by what they are called.
_GROWS = {"text": "text_delta", "thinking": "thinking_delta"}


async def _events(
    served: ServedModel, answers: Answers, head: dict[str, Any], stops: Sequence[str]
) -> AsyncIterator[str]:
    """A block is begun, grows by deltas and is ended; then comes why the message ended."""

    def event(kind: str, **data: Any) -> str:
        return line({"type": kind, **data}, kind)

    begun = {**head, "content": [], "stop_reason": None, "stop_sequence": None}
    yield event("message_start", message={**begun, "usage": {"input_tokens": 0, "output_tokens": 0}})
    place, open_ = -1, ""  # the newest block, and what it is called where it goes on
    async for choice, _ in answers:
        for part in choice.fresh:
            block = _block(part)
            kind = block["type"]
            if open_ and open_ != kind:
                yield event("content_block_stop", index=place)
            if open_ != kind or kind not in _GROWS:
                place += 1
                empty = {kind: ""} if kind in _GROWS else {"input": {}}
                yield event("content_block_start", index=place, content_block={**block, **empty})
            open_ = kind if kind in _GROWS else ""
            if isinstance(part, Call):
                delta = {"type": "input_json_delta", "partial_json": part.json_arguments}
                yield event("content_block_delta", index=place, delta=delta)
                yield event("content_block_stop", index=place)
            else:
                yield event("content_block_delta", index=place, delta={"type": _GROWS[kind], kind: block[kind]})
    if open_:
        yield event("content_block_stop", index=place)
    yield event("message_delta", delta=_end(served, answers.choices[0], stops), usage=_usage(answers))
    yield event("message_stop")
