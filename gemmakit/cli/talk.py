"""A conversation: what was said, what the model still sees of it, and the cache that spares reading it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemmakit.cli.answer import Answer, Write, answer, turn_ends
from gemmakit.errors import PromptTooLong
from gemmakit.pipelines import DEFAULT_NEW_TOKENS, TextGenerationPipeline

Said = dict[str, str]


@dataclass
class Conversation:
    """User and assistant in turn.

    messages: everything said, pairs of a question and its answer. forgotten: messages at the start that no longer fit
    the context. system: put in front of the first message the model sees.
    """

    pipe: TextGenerationPipeline
    settings: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    messages: list[Said] = field(default_factory=list)
    forgotten: int = 0
    _cache: Any = None
    _held: list[int] = field(default_factory=list)

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
        ids, forgotten = self._fitted(question)
        cache = self._cached(ids)
        try:
            said = answer(self.pipe, ids, write, past_key_values=cache, **turn_ends(self.pipe), **self.settings)
        except BaseException:
            self._cache = None
            raise
        # A cache that Ctrl-C met half-way through a layer is not to be trusted.
        self._cache = None if said.finish_reason == "interrupted" else cache
        self._held = ids + said.ids
        if said.text.strip():
            self.forgotten = forgotten
            self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said.text}]
        return said

    def _fitted(self, question: str) -> tuple[list[int], int]:
        """The prompt's ids, with as many of the oldest messages left out as it takes to have room for an answer."""
        context = self.pipe.model.config.max_position_embeddings
        room = min(self.settings.get("max_new_tokens", DEFAULT_NEW_TOKENS), context // 4)
        ids: list[int] = []
        for start in range(self.forgotten, len(self.messages) + 1, 2):
            ids = self.pipe.encode(self._seen(start, question))
            if len(ids) + room <= context:
                return ids, start
        raise PromptTooLong(
            f"the message makes a prompt of {len(ids)} tokens, but the context holds {context}, {room} of them for the "
            "answer. Send less at a time."
        )

    def _seen(self, start: int, question: str) -> list[Said]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages[start:], {"role": "user", "content": question}]

    def _cached(self, ids: list[int]) -> Any:
        """The cache, cut back to what it has in common with the prompt."""
        from gemmakit.pytorch.cache import DynamicCache

        if self._cache is None:
            self._cache = DynamicCache()
        pairs = zip(self._held, ids, strict=False)
        common = next((i for i, (held, new) in enumerate(pairs) if held != new), min(len(self._held), len(ids)))
        self._cache.crop(min(common, len(ids) - 1))
        return self._cache
