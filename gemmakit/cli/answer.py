"""One answer as it is generated: streamed, counted, timed, and kept when Ctrl-C ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemmakit.cli.shell import show
from gemmakit.text.response import ResponseParser, Thought

if TYPE_CHECKING:
    from gemmakit.pipelines import TextGenerationPipeline

Write = Callable[[str | Thought], None]


class Shown:
    """Prints an answer as it comes: text, and thoughts dim above it, on a terminal alone."""

    def __init__(self) -> None:
        self._thought = False  # whether the last piece was one

    def __call__(self, piece: str | Thought) -> None:
        thought = isinstance(piece, Thought)
        if self._thought and not thought:
            show("\n\n", dim=True)
        self._thought = thought
        show(piece.text if isinstance(piece, Thought) else piece, dim=thought)


@dataclass(frozen=True)
class Answer:
    """What came of a prompt. finish_reason: "stop" (an end token or a stop text), "length", "interrupted".

    new_tokens: how many, the ending one included; ids: which, where the model ran in this process. thought: what a
    chat's model thought before its text.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    first_s: float  # until the first token
    rest_s: float  # from the first token to the last
    ids: list[int] = field(default_factory=list[int])
    thought: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first token, which also pays for reading the prompt; of all of it where there is but one."""
        new = self.new_tokens
        if new > 1 and self.rest_s > 0:
            return (new - 1) / self.rest_s
        return new / self.first_s if self.first_s > 0 else 0.0

    @property
    def summary(self) -> str:
        """One line of numbers."""
        return (
            f"{self.prompt_tokens} prompt tokens, first new one after {self.first_s * 1000:.0f} ms; "
            f"{self.new_tokens} new tokens at {self.tokens_per_s:.1f} tokens/s ({self.finish_reason})"
        )

    def record(self, prompt: str) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "generated_text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            **({"reasoning": self.thought} if self.thought else {}),
        }


def answer(pipe: TextGenerationPipeline, prompt: str | Sequence[int], write: Write, **settings: Any) -> Answer:
    """Continue a text, or the ids of a chat, handing what is new to `write` once it is certain.

    A chat's thoughts are told apart. Ctrl-C ends it and keeps the text.

    Without max_new_tokens: 256, or what the context has left. Settings and errors are those of `generate`.
    """
    import torch  # not by whoever asks a server

    ids = pipe.encode(prompt) if isinstance(prompt, str) else list(prompt)
    room = pipe.room(len(ids), pipe.model.generation_config, settings)
    limit = {} if room is None else {"max_new_tokens": room}
    parser = None if isinstance(prompt, str) else ResponseParser(pipe.tokenizer, prompt=ids, calls=False)
    new, parts, reason = list[int](), list[str | Thought](), "length"

    def tell(pieces: Sequence[Any]) -> None:
        for piece in pieces:
            parts.append(piece)
            write(piece)

    start = first = last = time.perf_counter()
    try:
        rows = torch.tensor([ids], device=pipe.device)
        with closing(pipe.model.stream(rows, tokenizer=pipe.tokenizer, **{**settings, **limit})) as events:
            for event in events:
                last = time.perf_counter()
                first = first if new else last
                new.append(event.token)
                reason = event.finish_reason
                if parser is not None:
                    tell(parser.push(event.token, event.text))
                elif event.text:
                    tell([event.text])
        tell(parser.finish() if parser is not None else ())
    except KeyboardInterrupt:
        reason = "interrupted"
    return Answer(
        text="".join(part for part in parts if isinstance(part, str)),
        finish_reason="stop" if reason == "eos" else reason or "length",
        prompt_tokens=len(ids),
        new_tokens=len(new),
        first_s=first - start,
        rest_s=last - first,
        ids=new,
        thought="".join(part.text for part in parts if isinstance(part, Thought)),
    )


def ask(
    pipe: TextGenerationPipeline, question: str, write: Write, variables: Mapping[str, Any], **settings: Any
) -> Answer:
    """The answer to a question in a chat of its own. variables: of the chat template."""
    ids = pipe.encode([{"role": "user", "content": question}], chat_template_kwargs=variables)
    return answer(pipe, ids, write, **pipe.turn_ends(), **settings)
