"""POST /v1/completions: texts, or ids, go on."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gemmakit.pytorch.decode.batch import Event, PromptLogprob
from gemmakit.serve.generation import Answers, Choice
from gemmakit.serve.protocol import CompletionRequest
from gemmakit.serve.refusals import Refusal
from gemmakit.serve.served import NEVER, ServedModel
from gemmakit.serve.service import service_of
from gemmakit.serve.stream import DONE, STREAMED, EventStream, line, while_there

router = APIRouter(tags=["openai"])
# OpenAI's default of this route.
DEFAULT_TOKENS = 16


@router.post("/v1/completions", responses=STREAMED)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue texts or ids."""
    service = service_of(request)
    served = service.ready(body.model)
    service.count_unknown(body)
    _refuse(body)
    prompts = [await served.encoded(each) for each in _prompts(body.prompt)]
    wanted = [
        service.make(
            request,
            body,
            prompt,
            max_tokens=DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
            stop=body.stop,
            response_format=body.response_format,
            n=body.n or 1,
            best_of=body.best_of,
            logprobs=body.logprobs,
            prompt_logprobs=_prompt_scores(body),
        )
        for prompt in prompts
    ]
    answers = await service.answers(request, wanted)
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model or served.name}
    head["object"] = "text_completion"
    pieces = _Pieces(served, body, answers)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(pieces, head, usage), answers, service.settings.heartbeat_s)
    choices = await while_there(request, answers, answers.finish())
    return JSONResponse({**head, "choices": [pieces.whole(choice) for choice in choices], "usage": answers.usage})


def _refuse(body: CompletionRequest) -> None:
    if body.suffix:
        raise Refusal(400, "suffix cannot be honoured: Gemma writes forwards only.", param="suffix", code="unsupported")
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "stream_options needs stream: true.", param="stream_options")
    if body.max_tokens == 0 and not body.echo:
        raise Refusal(400, "max_tokens is 0: ask for at least 1, or for the prompt with echo.", param="max_tokens")
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise Refusal(400, f"best_of is {body.best_of}, below n, which is {body.n or 1}.", param="best_of")
    if body.stream and body.best_of is not None and body.best_of > (body.n or 1):
        raise Refusal(400, "best_of cannot be streamed: which answers are best is known at the end.", param="best_of")


def _prompt_scores(body: CompletionRequest) -> int | None:
    """How many of the likeliest tokens are told beside the prompt's. Without new tokens, scores are all there is."""
    if not body.echo:
        return None
    return 0 if body.max_tokens == 0 and body.logprobs is None else body.logprobs


def _prompts(prompt: Any) -> Sequence[str | Sequence[int]]:
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


class _Pieces:
    """Choices as this route tells them: text, scores side by side in lists, and with echo the prompt in front."""

    def __init__(self, served: ServedModel, body: CompletionRequest, answers: Answers):
        self.served, self.echo, self.scored, self.answers = served, bool(body.echo), body.logprobs is not None, answers
        self._offsets = [0] * len(answers.choices)

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = self.prompt(choice) + choice.text
        return self.piece(choice, text, choice.events, choice.finish_reason)

    def prompt(self, choice: Choice) -> str:
        """The prompt's text where it is to be said again."""
        if not self.echo:
            return ""
        return self.served.tokenizer.decode(self.answers.prompt_of(choice), skip_special_tokens=True)

    def piece(self, choice: Choice, text: str, events: Sequence[Event], reason: str | None) -> dict[str, Any]:
        scores = self._scores(choice, events) if self.scored else None
        return {"index": choice.index, "text": text, "logprobs": scores, "finish_reason": reason}

    def _scores(self, choice: Choice, events: Sequence[Event]) -> dict[str, Any]:
        """The tokens of some events, those of the prompt in front of the first where it is said again."""
        found: list[PromptLogprob | None] = []
        for event in events:
            found += event.prompt_logprobs or ()
            if event.token is not None and event.logprob is not None:
                found.append(PromptLogprob(event.token, event.logprob, event.top_logprobs))
        prompt = self.answers.prompt_of(choice)
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for place, scored in enumerate(found):
            token = prompt[place] if scored is None else scored.token
            text = self.served.token_text(token)
            out["tokens"].append(text)
            out["token_logprobs"].append(None if scored is None else max(scored.logprob, NEVER))
            out["top_logprobs"].append(None if scored is None else self._top(scored))
            out["text_offset"].append(self._offsets[choice.index])
            self._offsets[choice.index] += 0 if self.served.is_special(token) else len(text)
        return out

    def _top(self, scored: PromptLogprob) -> dict[str, float]:
        """By their texts; of tokens that look alike the likeliest, and the chosen one in any case."""
        found: dict[str, float] = {}
        for token, logprob in scored.top_logprobs:
            found.setdefault(self.served.token_text(token), max(logprob, NEVER))
        found.setdefault(self.served.token_text(scored.token), max(scored.logprob, NEVER))
        return found


async def _chunks(pieces: _Pieces, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """The stream's events: pieces of text, an empty one with the reason last, then the usage if it is asked for."""
    if usage:
        head = {**head, "usage": None}
    begun: set[int] = set()
    async for choice, event in pieces.answers:
        text = event.text
        if choice.index not in begun:
            begun.add(choice.index)
            text = pieces.prompt(choice) + text
        if text or event.logprob is not None or event.prompt_logprobs is not None:
            yield line({**head, "choices": [pieces.piece(choice, text, [event], None)]})
        if choice.finish_reason is not None:
            last = {"index": choice.index, "text": "", "logprobs": None, "finish_reason": choice.finish_reason}
            yield line({**head, "choices": [last]})
    if usage:
        yield line({**head, "choices": [], "usage": pieces.answers.usage})
    yield DONE
