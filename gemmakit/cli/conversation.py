"""What was said, what the model still sees of it, and the cache that spares reading it again."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemmakit.cli import options as o
from gemmakit.cli.answer import Answer, Write, answer
from gemmakit.errors import PromptTooLong

if TYPE_CHECKING:
    from gemmakit.pipelines import TextGenerationPipeline

Said = dict[str, str]


@dataclass
class Conversation:
    """User and assistant in turn.

    messages: everything said, pairs of a question and its answer. forgotten: messages at the start that no longer fit
    the context. system: put in front of the first message the model sees. variables: what else the chat template is
    told. What the model thought is not told it again.
    """

    pipe: TextGenerationPipeline
    settings: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    messages: list[Said] = field(default_factory=list)
    forgotten: int = 0
    variables: dict[str, Any] = field(default_factory=dict)
    _cache: Any = None
    _held: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.pipe.model.name_or_path)

    @property
    def context(self) -> int:
        return self.pipe.model.config.max_position_embeddings

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages, self.forgotten, self._cache, self._held = [], 0, None, []

    def transcript(self) -> list[Said]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]

    def ask(self, question: str, write: Write) -> Answer:
        """The answer, which joins the conversation with its question; a question that got no word of answer does not.

        Raises PromptTooLong when the question alone does not fit, and what `generate` raises; nothing is then changed.
        """
        prompt, forgotten = self._fitted(question)
        said = self._say(prompt, write)
        if said.text.strip():
            self.forgotten = forgotten
            self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said.text}]
        return said

    def _say(self, prompt: Any, write: Write) -> Answer:
        cache = self._cached(prompt)
        try:
            said = answer(self.pipe, prompt, write, past_key_values=cache, **self.pipe.turn_ends(), **self.settings)
        except BaseException:
            self._cache = None
            raise
        # A cache that Ctrl-C met half-way through a layer is not to be trusted.
        self._cache = None if said.finish_reason == "interrupted" else cache
        self._held = prompt + said.ids
        return said

    def _encode(self, messages: Sequence[Said]) -> Sized:
        """The prompt that messages make; its length is its tokens."""
        return self.pipe.encode(messages, chat_template_kwargs=self.variables)

    def _fitted(self, question: str) -> tuple[Sized, int]:
        """The prompt, with as many of the oldest messages left out as it takes to have room for an answer."""
        context = self.context
        room = min(self.settings.get("max_new_tokens", o.DEFAULT_NEW_TOKENS), context // 4)
        prompt: Sized = ()
        for start in range(self.forgotten, len(self.messages) + 1, 2):
            prompt = self._encode(self._seen(start, question))
            if len(prompt) + room <= context:
                return prompt, start
        raise PromptTooLong(
            f"the message makes a prompt of {len(prompt)} tokens, but the context holds {context}, {room} of them for "
            "the answer. Send less at a time."
        )

    def _seen(self, start: int, question: str) -> list[Said]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages[start:], {"role": "user", "content": question}]

    def _cached(self, ids: list[int]) -> Any:
        """The cache, cut back to what it has in common with the prompt."""
        from gemmakit.pytorch.cache import DynamicCache  # torch is there by now, and not before

        if self._cache is None:
            self._cache = DynamicCache()
        pairs = zip(self._held, ids, strict=False)
        common = next((i for i, (held, new) in enumerate(pairs) if held != new), min(len(self._held), len(ids)))
        self._cache.crop(min(common, len(ids) - 1))
        return self._cache
