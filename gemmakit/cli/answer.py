"""One answer as it is generated: streamed, counted, timed, and kept when Ctrl-C ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemmakit.pipelines import TextGenerationPipeline
from gemmakit.streamers import TextStreamer

Write = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What came of a prompt. finish_reason: "stop" (an end token or a stop text), "length", "interrupted"."""

    text: str
    finish_reason: str
    prompt_tokens: int
    ids: list[int]  # new tokens, the ending one included
    first_s: float  # until the first token
    rest_s: float  # from the first token to the last

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first token, which also pays for reading the prompt; of all of it where there is but one."""
        new = len(self.ids)
        if new > 1 and self.rest_s > 0:
            return (new - 1) / self.rest_s
        return new / self.first_s if self.first_s > 0 else 0.0

    @property
    def summary(self) -> str:
        """One line of numbers."""
        return (
            f"{self.prompt_tokens} prompt tokens, first new one after {self.first_s * 1000:.0f} ms; "
            f"{len(self.ids)} new tokens at {self.tokens_per_s:.1f} tokens/s ({self.finish_reason})"
        )

    def record(self, prompt: str) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "generated_text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.ids),
            "tokens_per_s": round(self.tokens_per_s, 1),
        }


class Meter(TextStreamer):
    """Writes the new text as it comes and notes what and when. Tokens in `hidden` are counted, not shown."""

    def __init__(self, tokenizer: Any, write: Write, hidden: Sequence[int]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._hidden = write, frozenset(hidden)
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.start = self.first = self.last = time.perf_counter()

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt:
            return super().put(value)
        self.last = time.perf_counter()
        self.first = self.first if self.ids else self.last
        self.ids += value.tolist()
        if self.ids[-1] not in self._hidden:
            super().put(value)
        return None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.texts.append(text)
            self._write(text)


def answer(pipe: TextGenerationPipeline, prompt: str | Sequence[int], write: Write, **settings: Any) -> Answer:
    """Continue a text (or its ids), handing new text to `write` once it is certain. Ctrl-C ends it and keeps the text.

    Without max_new_tokens: 256, or what the context has left. Settings and errors are those of `generate`.
    """
    ids = pipe.encode(prompt) if isinstance(prompt, str) else list(prompt)
    config = pipe.model.generation_config.updated(**{k: v for k, v in settings.items() if k == "eos_token_id"})
    room = pipe.room(len(ids), config, settings)
    limit = {} if room is None else {"max_new_tokens": room}
    meter = Meter(pipe.tokenizer, write, hidden=config.eos_token_ids)
    interrupted = False
    try:
        rows = torch.tensor([ids], device=pipe.device)
        pipe.model.generate(rows, streamer=meter, tokenizer=pipe.tokenizer, **{**settings, **limit})
    except KeyboardInterrupt:
        interrupted = True
    stopped = meter.ids[-1:] and meter.ids[-1] in config.eos_token_ids
    stopped = stopped or any(stop in meter.text for stop in settings.get("stop_strings", ()))
    return Answer(
        text=meter.text,
        finish_reason="interrupted" if interrupted else "stop" if stopped else "length",
        prompt_tokens=len(ids),
        ids=meter.ids,
        first_s=meter.first - meter.start,
        rest_s=meter.last - meter.first,
    )


def ask(pipe: TextGenerationPipeline, question: str, write: Write, **settings: Any) -> Answer:
    """The answer to a question in a chat of its own."""
    ids = pipe.encode([{"role": "user", "content": question}])
    return answer(pipe, ids, write, **turn_ends(pipe), **settings)


def turn_ends(pipe: TextGenerationPipeline) -> dict[str, Any]:
    """The setting that ends a turn at <end_of_turn>, which some checkpoints do not list among their ends."""
    ends = list(pipe.model.generation_config.eos_token_ids)
    end = pipe.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    if end not in (None, pipe.tokenizer.unk_token_id, *ends):
        ends.append(end)
    return {"eos_token_id": ends} if ends else {}
