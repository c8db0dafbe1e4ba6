"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gemmakit.pytorch.decode.batch import Event
from gemmakit.serve.conversation import Call, thinks_by_effort
from gemmakit.serve.generation import Answers, Choice, text_of, thought_of
from gemmakit.serve.protocol import ChatRequest
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.served import NEVER, ServedModel
from gemmakit.serve.service import service_of
from gemmakit.serve.stream import DONE, STREAMED, EventStream, line, while_there

router = APIRouter(tags=["openai"])


@router.post("/v1/chat/completions", responses=STREAMED)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    served = service.ready(body.model)
    service.count_unknown(body)
    _refuse(body)
    answers = await service.chat(
        request,
        body,
        body.messages,
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel=body.parallel_tool_calls is not False,
        thinks=thinks_by_effort(body.reasoning_effort),
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        stop=body.stop,
        response_format=body.response_format,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model or served.name}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(served, answers, head, usage), answers, service.settings.heartbeat_s)
    choices = await while_there(request, answers, answers.finish())
    told = [_choice(served, choice) for choice in choices]
    return JSONResponse({**head, "object": "chat.completion", "choices": told, "usage": answers.usage})


def _refuse(body: ChatRequest) -> None:
    """Raises Refusal for what is known, changes the answer, and is not to be had."""
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "stream_options needs stream: true.", param="stream_options")
    text_alone = body.modalities in (None, ["text"])
    absent = {
        "functions": (body.functions, "use tools"),
        "function_call": (body.function_call, "use tool_choice"),
        "audio": (body.audio, "gemmakit writes text"),
        "modalities": (None if text_alone else body.modalities, "gemmakit writes text"),
        "web_search_options": (body.web_search_options, "gemmakit opens no addresses"),
    }
    for name, (value, remedy) in absent.items():
        if value:
            raise Refusal(400, f"{name} cannot be honoured: {remedy}.", param=name, code="unsupported")


async def _chunks(served: ServedModel, answers: Answers, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """The stream's events: the role first, an empty delta with the reason last, then the usage if it is asked for."""
    head = {**head, "object": "chat.completion.chunk"}
    if usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return line({**head, "choices": [choice]})

    for choice in answers.choices:
        yield chunk(choice.index, {"role": "assistant", "content": ""})
    async for choice, event in answers:
        scores, called = _scores(served, [event]), len(choice.calls)
        text, thought = text_of(choice.fresh), thought_of(choice.fresh)
        new = [part for part in choice.fresh if isinstance(part, Call)]
        if text or thought or scores:
            yield chunk(
                choice.index,
                {**_thought(thought), **({} if thought and not text else {"content": text})},
                logprobs=scores,
            )
        if new:
            calls = [{"index": i, **_call(call)} for i, call in enumerate(new, called - len(new))]
            yield chunk(choice.index, {"tool_calls": calls})
        if choice.finish_reason is not None:
            yield chunk(choice.index, {}, finish_reason=choice.finish_reason)
    if usage:
        yield line({**head, "choices": [], "usage": answers.usage})
    yield DONE


def _choice(served: ServedModel, choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None, **_thought(choice.thought)}
    if choice.calls:
        message |= {"content": choice.text or None, "tool_calls": [_call(call) for call in choice.calls]}
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _scores(served, choice.events),
        "finish_reason": choice.finish_reason,
    }


def _thought(text: str) -> dict[str, str]:
    """A thought by both of the names that clients look for."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.json_arguments}
    return {"id": call.id, "type": "function", "function": function}


def _scores(served: ServedModel, events: list[Event]) -> dict[str, Any] | None:
    """Log probabilities as a chat has them; None where they were not asked for."""

    def score(token: int, logprob: float) -> dict[str, Any]:
        text, data = served.token_text(token), list(served.token_bytes(token))
        return {"token": text, "logprob": max(logprob, NEVER), "bytes": data}

    content = [
        {**score(e.token, e.logprob), "top_logprobs": [score(*each) for each in e.top_logprobs]}
        for e in events
        if e.token is not None and e.logprob is not None
    ]
    return {"content": content, "refusal": None} if content else None
