"""From what a client asks to what the engine is asked, and back: the one way that every route takes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from gemmakit.pytorch.decode.batch import Event, Request, Usage
from gemmakit.serve.conversation import Call, Part, Reader
from gemmakit.serve.protocol import ResponseFormat, Sampling
from gemmakit.serve.refusals import Refusal, refusal_of
from gemmakit.serve.served import ServedModel
from gemmakit.serve.worker import Job, Outbox, Worker
from gemmakit.text.response import Thought

# Fields that are settings of generate() by the same name, and those that only sampling reads.
_SAME = ("repetition_penalty", "regex", "grammar", "json_schema")
SHAPES = ("json_schema", "regex", "grammar")
_DRAWN = ("temperature", "top_p", "top_k", "min_p", "seed")


@dataclass(frozen=True)
class Penalties:
    """OpenAI's: a logit loses `frequency` for each time its token was generated, and `presence` if it was at all."""

    prompt_length: int
    frequency: float
    presence: float

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores)
        new = ids[:, self.prompt_length :]
        counts.scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def settings_of(body: Sampling) -> dict[str, Any]:
    """The settings of generate() that the sampling fields are."""
    found = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.temperature == 0:
        found["do_sample"] = False
    elif drawn := {name: value for name in _DRAWN if (value := getattr(body, name)) is not None}:
        found |= {**drawn, "do_sample": True}
        if drawn.get("top_k") == -1:
            found["top_k"] = 0
    if body.min_tokens:
        found["min_new_tokens"] = body.min_tokens
    if body.logit_bias:
        found["sequence_bias"] = {(_token(key),): bias for key, bias in body.logit_bias.items()}
    return found


def shape_of(asked: ResponseFormat | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The setting that makes an answer follow a response_format."""
    if asked is None or asked.type == "text":
        return {}
    if "json_schema" in settings:
        raise Refusal(400, "response_format and json_schema are both given: give one of them.", param="json_schema")
    if asked.type == "json_object":
        return {"json_schema": {"type": "object"}}
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise Refusal(400, "response_format needs json_schema.schema.", param="response_format.json_schema.schema")
    return {"json_schema": asked.json_schema.schema_}


def _token(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise Refusal(400, f"logit_bias has the key {key!r:.80}; its keys are token ids.", param="logit_bias")
    return int(key)


def make_request(
    served: ServedModel,
    body: Sampling,
    prompt: list[int],
    *,
    max_tokens: int | None,
    salt: str,
    deadline: float | None,
    stop: str | Sequence[str] | None = None,
    response_format: ResponseFormat | None = None,
    chat: bool = False,
    n: int = 1,
    best_of: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    answer: str | None = None,
    one_call: bool = False,
) -> Request:
    """What the engine is asked. max_tokens: None for as many as there is room for. chat: end where a turn does.

    answer: a grammar of what must be answered, of a call for instance. one_call: end where the first call does.
    """
    settings = settings_of(body)
    settings |= shape_of(response_format, settings)
    if answer is not None:
        if shape := next((name for name in SHAPES if name in settings), None):
            said = f"tool_choice asks for a call, which cannot follow the {shape} that is asked for: give one of them."
            raise Refusal(400, said, param="tool_choice")
        settings["grammar"] = answer
    settings["max_new_tokens"] = max(1, served.context - len(prompt)) if max_tokens is None else max_tokens
    if settings.get("min_new_tokens", 0) > settings["max_new_tokens"]:
        raise Refusal(400, f"min_tokens is {body.min_tokens}, but max_tokens is {max_tokens}.", param="min_tokens")
    if stop:
        settings["stop_strings"] = [stop] if isinstance(stop, str) else list(stop)
    settings |= _ends(served, body, chat, one_call)
    penalties = Penalties(len(prompt), body.frequency_penalty or 0.0, body.presence_penalty or 0.0)
    return Request(
        prompt,
        settings=settings,
        tokenizer=served.tokenizer,
        logits_processor=(penalties,) if penalties.frequency or penalties.presence else (),
        n=n,
        best_of=best_of,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        adapter=body.model if body.model in served.adapters else None,
        cache_salt=salt if body.cache_salt is None else f"salt {body.cache_salt}",
        deadline=deadline,
    )


def _ends(served: ServedModel, body: Sampling, chat: bool, one_call: bool) -> dict[str, Any]:
    """The tokens that end an answer, where they are not the model's own."""
    own = list(served.pipe.model.generation_config.eos_token_ids)
    ends = [] if body.ignore_eos else list(served.pipe.turn_ends().get("eos_token_id", [])) if chat else own
    ends += body.stop_token_ids or []
    if one_call and ends and served.call_end is not None:
        ends.append(served.call_end)
    return {} if ends == own else {"eos_token_id": ends or None}


@dataclass
class Choice:
    """One answer as far as it is known. fresh: what the last event added to `parts`."""

    index: int
    reader: Reader
    parts: list[Part] = field(default_factory=list[Part])
    fresh: list[Part] = field(default_factory=list[Part])
    events: list[Event] = field(default_factory=list[Event])
    finish_reason: str | None = None
    usage: Usage | None = None

    @property
    def text(self) -> str:
        return text_of(self.parts)

    @property
    def thought(self) -> str:
        return thought_of(self.parts)

    @property
    def calls(self) -> list[Call]:
        return [part for part in self.parts if isinstance(part, Call)]

    def add(self, event: Event) -> None:
        ended = event.finish_reason
        self.fresh = self.reader.push(event.token, event.text, ended is not None)
        self.parts += self.fresh
        self.events.append(event)
        if ended is not None:
            reason = REASONS.get(ended, ended)
            self.finish_reason = "tool_calls" if reason == "stop" and self.calls else reason
            self.usage = event.usage


def text_of(parts: Sequence[Part]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


def thought_of(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Thought))


# The engine's reasons in OpenAI's words.
REASONS = {"eos": "stop"}


class Answers:
    """The answers to one HTTP request, n to each of its prompts: to be iterated, and to be left at any time.

    begun: when, by the monotonic clock. reader: makes what reads one of them.
    """

    def __init__(
        self, worker: Worker, requests: Sequence[Request], buffered: int, reader: Callable[[], Reader] = Reader
    ):
        self.worker, self.outbox = worker, Outbox(buffered)
        self.jobs = [Job(request, self.outbox, place) for place, request in enumerate(requests)]
        self.choices = [Choice(i, reader()) for i in range(sum(request.n for request in requests))]
        self._open, self.begun = len(self.choices), time.monotonic()

    async def start(self) -> None:
        """Raises what adding raises; then nothing is under way."""
        try:
            for job in self.jobs:
                await self.worker.submit(job)
        except BaseException:
            self.leave()
            raise

    async def __aiter__(self) -> AsyncIterator[tuple[Choice, Event]]:
        """Raises Refusal where an answer ends in an error."""
        while self._open:
            job, event = await self.outbox.events.get()
            choice = self.choices[job.place * job.request.n + event.index]
            choice.add(event)
            if event.finish_reason is not None:
                self._open -= 1
                _refuse(event)
            yield choice, event

    def prompt_of(self, choice: Choice) -> list[int]:
        return cast("list[int]", self.jobs[choice.index // self.jobs[0].request.n].request.prompt)

    async def finish(self) -> list[Choice]:
        async for _ in self:
            pass
        return self.choices

    def leave(self) -> None:
        """End what has not ended."""
        for job in self.jobs:
            if job.open:
                self.worker.cancel(job)

    @property
    def usage(self) -> dict[str, Any]:
        """As OpenAI counts: prompts once, however many answers they get."""
        said = [choice.usage for choice in self.choices]
        first = [said[job.place * job.request.n] for job in self.jobs]
        prompt = sum(usage.prompt_tokens for usage in first if usage)
        new = sum(usage.completion_tokens for usage in said if usage)
        cached = sum(usage.cached_tokens for usage in first if usage)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(c.reader.thought_tokens for c in self.choices)},
        }


def _refuse(event: Event) -> None:
    if event.error is not None:
        raise refusal_of(event.error)
    if event.finish_reason == "timeout":
        raise Refusal(
            503, "the request waited too long for its turn.", code="queue_timeout", headers={"Retry-After": "5"}
        )
