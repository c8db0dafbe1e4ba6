"""A model as a server has it: its names, its prompts as ids, its tokens as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from gemmakit.pipelines import EmbeddingModel, TextGenerationPipeline
from gemmakit.pytorch.decode.token_bytes import token_table
from gemmakit.serve.refusals import Refusal

T = TypeVar("T")
# Texts become ids beside the event loop, so that a long one holds nobody up.
READERS = 2
# Characters that are ids sooner than another thread has begun.
SHORT = 1024
# OpenAI's word for a probability of zero, which JSON has no number for.
NEVER = -9999.0


class ServedModel:
    """names: what clients may call it; the first is what it calls itself. adapters: names by which clients call it with
    an adapter.

    pipe: for a model that generates; embedder: for one that embeds. One of them is there.
    """

    def __init__(
        self,
        names: Sequence[str],
        pipe: TextGenerationPipeline | None = None,
        embedder: EmbeddingModel | None = None,
        room: int | None = None,
        adapters: Sequence[str] = (),
    ):
        self.adapters = tuple(adapters)
        self.names, self._pipe, self.embedder = tuple(names), pipe, embedder
        self.created = int(time.time())
        self.tokenizer: Any = embedder.tokenizer if pipe is None and embedder is not None else pipe and pipe.tokenizer
        config = (embedder if pipe is None else pipe).model.config  # type: ignore[union-attr]
        self.vocabulary: int = config.vocab_size
        self.context: int = min(config.max_position_embeddings, room or config.max_position_embeddings)
        self._readers = ThreadPoolExecutor(READERS, "gemmakit-reader")

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def pipe(self) -> TextGenerationPipeline:
        """Raises Refusal for a model that does not generate."""
        if self._pipe is None:
            raise Refusal(400, "this model gives embeddings, not texts: use /v1/embeddings.")
        return self._pipe

    @property
    def draws(self) -> bool:
        """Whether an answer whose settings say nothing is drawn, and not the likeliest."""
        return self._pipe is not None and bool(self._pipe.model.generation_config.do_sample)

    def check_name(self, name: str | None) -> None:
        """Raises Refusal for a name that is not this model's; none means it."""
        if name is not None and name not in (*self.names, *self.adapters):
            known = ", ".join((*self.names, *self.adapters))
            raise Refusal(404, f"there is no model {name!r:.200} here; there is {known}.", code="model_not_found")

    @cached_property
    def has_tools(self) -> bool:
        """Whether the chat template has a word for tools."""
        return self.tokenizer.template_reads("tools")

    @cached_property
    def has_thinking(self) -> bool:
        """Whether the chat template lets its model think."""
        return self.tokenizer.template_reads("enable_thinking")

    @cached_property
    def capabilities(self) -> list[str]:
        """What may be asked of it, in the words that clients look for."""
        if self._pipe is None:
            return ["embedding"]
        known = {"completion": True, "tools": self.has_tools, "thinking": self.has_thinking}
        return [name for name, has in known.items() if has]

    @cached_property
    def call_end(self) -> int | None:
        """The token that ends a call; None where the vocabulary has none."""
        known = self.tokenizer.added_token(self.tokenizer.response_form.call_end)
        return None if known is None else known[0]

    @cached_property
    def has_developer(self) -> bool:
        return "developer" in self.tokenizer.get_chat_template(tools=[])

    async def aside(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Run what takes long in another thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, lambda: function(*arguments, **named))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids of a conversation; an answer of the assistant's at its end is gone on with. variables: of the
        template.
        """
        return self.pipe.encode(messages, tools=tools, chat_template_kwargs=variables)

    async def encoded(self, prompt: str | Sequence[int]) -> list[int]:
        """As `encode_prompt`, beside the event loop where it takes long."""
        if len(prompt) <= SHORT:
            return self.encode_prompt(prompt)
        return await self.aside(self.encode_prompt, prompt)

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a text, with its <bos>; ids as they are. Raises TokenOutOfRange when the engine is given them."""
        return self.pipe.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def is_special(self, token: int) -> bool:
        """Whether a token adds nothing to a text."""
        return token in token_table(self.tokenizer, self.vocabulary)[1]

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text; a special one its name."""
        return token_table(self.tokenizer, self.vocabulary)[0][token]

    def token_text(self, token: int) -> str:
        """A token by itself, as OpenAI writes it: one that is part of a character by its bytes."""
        try:
            return self.token_bytes(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.token_bytes(token))
