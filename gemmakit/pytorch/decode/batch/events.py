"""What an engine tells of its requests and of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# (token id, log probability), the likeliest first
TopLogprobs = Sequence[tuple[int, float]]


class PromptLogprob(NamedTuple):
    """A prompt's token as the model expected it after those before; fields as in Event."""

    token: int
    logprob: float
    top_logprobs: TopLogprobs


@dataclass(frozen=True)
class Usage:
    """What an answer took, in tokens and in seconds since its request was added.

    cached_tokens: of the prompt, what was found computed. completion_tokens: an eos that ended the answer included.
    queued_s: until it first ran. first_token_s: until its first token; None without one.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queued_s: float
    first_token_s: float | None
    total_s: float


@dataclass(frozen=True)
class Event:
    """A request got a token, or ended, or both.

    token: None where it ended without a new one. finish_reason: "eos", "stop" (a stop string or criterion), "length"
    (of tokens or time), "cancelled", "timeout" (it waited past its deadline), "error"; None while it goes on.
    error: what went wrong, for "error". index: which of the request's n answers. text: what became certain of the
    answer's text, where the request has a tokenizer: without special tokens, cut before a stop string, never half a
    character; all pieces together are the answer.
    logprob, top_logprobs: of the token and of the likeliest ones, where the request asks for them. prompt_logprobs:
    one a token of the prompt, None for its first; in the first event. usage: in the last event of each index.
    """

    id: int
    token: int | None
    finish_reason: str | None = None
    error: Exception | None = None
    index: int = 0
    text: str = ""
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    prompt_logprobs: Sequence[PromptLogprob | None] | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class EngineStats:
    """How an engine stands, and what it has counted since it was made.

    running, waiting: answers now. cache_usage: the part of the pages that are held, 0 to 1. prefix_queries,
    prefix_hits: tokens of prompts that were looked up, and found computed. preemptions: answers that were sent back to
    waiting for want of pages. draft_tokens, accepted_tokens: that were proposed, and that were right; assistant_*: of
    these, by the assistant model.
    """

    running: int
    waiting: int
    cache_usage: float
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    draft_tokens: int
    accepted_tokens: int
    assistant_draft_tokens: int
    assistant_accepted_tokens: int
