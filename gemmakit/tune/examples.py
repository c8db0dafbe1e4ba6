"""Rows to ids and to what is learnt of them: the ids of a chat are those that a server would send for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemmakit.errors import GemmakitError, InputError
from gemmakit.text.spans import SPEAKERS
from gemmakit.tune.data import Refusals, Row

FORMS = "messages, or prompt and completion, or text; for pairs chosen and rejected"


@dataclass(frozen=True)
class Example:
    """ids, and for each whether it is learnt. The first has nothing before it, so it never is."""

    where: str
    ids: list[int]
    learnt: list[bool]

    @property
    def targets(self) -> int:
        return sum(self.learnt)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    where: str
    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class Question:
    """What a model is asked to see what it has learnt, and the answer that is right."""

    where: str
    prompt: list[int]
    answer: str


@dataclass(frozen=True)
class Encoder:
    """How rows become examples.

    limit: tokens a row. truncate: cut longer rows at their end instead of refusing them. chat: prompt and completion
    are turns. everything: learn prompts too. ends: the ids that end what is generated.
    """

    tokenizer: Any
    limit: int
    truncate: bool = False
    chat: bool = False
    everything: bool = False
    ends: frozenset[int] = frozenset()

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Raises InputError that names by line each row which is malformed, too long, or has nothing to learn."""
        return _each(rows, self.example)

    def pairs(self, rows: Sequence[Row]) -> list[Pair]:
        """As `examples`, of rows that hold a chosen and a rejected answer."""
        return _each(rows, self.pair)

    def example(self, row: Row) -> Example:
        values = row.values
        forms = [form for form in ("messages", "prompt", "text") if form in values]
        if len(forms) != 1:
            held = ", ".join(map(str, values)) or "nothing"
            raise InputError(f"must hold one of {FORMS}; it holds {held}. --columns maps other names")
        if "messages" in values:
            ids, learnt = self._chat(values["messages"], values.get("tools"))
        elif "prompt" in values:
            ids, learnt = self._answered(values["prompt"], _required(values, "completion"), values.get("tools"))
        else:
            ids = [*self.tokenizer(_string(values, "text"))["input_ids"], self._end()]
            learnt = [True] * len(ids)
        return self._checked(row.where, ids, learnt)

    def pair(self, row: Row) -> Pair:
        made = [self._checked(row.where, *self._side(row.values, name)) for name in ("chosen", "rejected")]
        if made[0].ids == made[1].ids:
            raise InputError("chosen and rejected are the same")
        return Pair(row.where, *made)

    def question(self, row: Row) -> Question | None:
        """The prompt before the last answer, and that answer; None where a row has none to compare with."""
        values = row.values
        if "messages" in values:
            messages = values["messages"]
            if messages[-1].get("role") not in SPEAKERS or not isinstance(messages[-1].get("content"), str):
                return None
            prompt = self._prompt(messages[:-1], values.get("tools"))
            return Question(row.where, prompt, messages[-1]["content"].strip())
        if "prompt" not in values or not isinstance(values.get("completion"), str):
            return None
        turns = self._turns(values["prompt"])
        prompt = (
            self.tokenizer(values["prompt"])["input_ids"] if turns is None else self._prompt(turns, values.get("tools"))
        )
        return Question(row.where, prompt, values["completion"].strip())

    def _side(self, values: Mapping[str, Any], name: str) -> tuple[list[int], list[bool]]:
        answer = _required(values, name)
        if "prompt" in values:
            return self._answered(values["prompt"], answer, values.get("tools"))
        if not isinstance(answer, list):
            raise InputError(f"lacks 'prompt': {name} alone must be a list of messages")
        ids, learnt = self._chat(answer, values.get("tools"))
        last = len(learnt) - learnt[::-1].index(True) if True in learnt else 0
        first = last - next((i for i, on in enumerate(reversed(learnt[:last])) if not on), last)
        return ids, [on and place >= first for place, on in enumerate(learnt)]

    def _turns(self, prompt: Any) -> list[Any] | None:
        """The prompt as messages; None where it is a text that goes on."""
        if isinstance(prompt, list):
            return prompt
        return [{"role": "user", "content": prompt}] if self.chat else None

    def _answered(self, prompt: Any, answer: Any, tools: Any) -> tuple[list[int], list[bool]]:
        turns = self._turns(prompt)
        if turns is not None:
            said = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
            _check_messages(turns)
            return self._chat([*({**turn, "weight": 0} for turn in turns), *said], tools)
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise InputError("prompt and completion must be texts, or lists of messages")
        if not answer:
            raise InputError("completion is empty, so there is nothing to learn")
        before = list(self.tokenizer(prompt)["input_ids"])
        after = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        ids = [*before, *after, self._end()]
        return ids, [self.everything] * len(before) + [True] * (len(after) + 1)

    def _chat(self, messages: Any, tools: Any) -> tuple[list[int], list[bool]]:
        _check_messages(messages)
        made = self.tokenizer.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True)
        ids = list(made["input_ids"])
        learnt = [True] * len(ids) if self.everything else [bool(m) for m in made["assistant_masks"]]
        if messages[-1]["role"] in SPEAKERS:
            return self._as_asked(self._prompt(messages[:-1], tools), ids, learnt)
        return ids, learnt

    def _as_asked(self, prompt: list[int], ids: list[int], learnt: list[bool]) -> tuple[list[int], list[bool]]:
        """The last turn behind the prompt that a server sends for it, which may open it with an empty thought that is
        not written of turns that are over.
        """
        start, thought = _shared(prompt, ids), self.tokenizer.response_form.thought
        if thought is None or start == len(prompt) or prompt[start] != self.tokenizer.convert_tokens_to_ids(thought):
            return ids, learnt
        opening = [self.everything] * (len(prompt) - start)
        return [*prompt, *ids[start:]], [*learnt[:start], *opening, *learnt[start:]]

    def _prompt(self, messages: Any, tools: Any) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"])

    def _end(self) -> int:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError("the tokenizer has no eos token, so the model could not learn where to end")
        return end

    def _checked(self, where: str, ids: list[int], learnt: list[bool]) -> Example:
        bos = self.tokenizer.bos_token_id
        if bos is not None and self.tokenizer._add_bos_token and (ids[:1] != [bos] or ids.count(bos) != 1):
            raise InputError(f"has {ids.count(bos)} <bos> tokens; it must have one, at its start")
        if len(ids) > self.limit:
            if not self.truncate:
                raise InputError(
                    f"has {len(ids)} tokens, but at most {self.limit} are trained on: shorten it, or pass --truncate"
                )
            ids, learnt = ids[: self.limit], learnt[: self.limit]
        learnt = [False, *learnt[1:]]
        if True not in learnt:
            raise InputError("holds nothing to learn: no turn of the assistant, or none within the length")
        return Example(where, ids, learnt)


def _shared(prompt: list[int], ids: list[int]) -> int:
    """How many ids the two begin with in common."""
    return next((i for i, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), len(prompt))


def _each(rows: Sequence[Row], make: Callable[[Row], Any]) -> list[Any]:
    refused = Refusals()
    made = [_tried(row, make, refused) for row in rows]
    refused.end()
    return made


def _tried(row: Row, make: Callable[[Row], Any], refused: Refusals) -> Any:
    try:
        return make(row)
    except GemmakitError as error:
        refused.add(row.where, error)


def _required(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise InputError(f"lacks {name!r}; it holds {', '.join(map(str, values))}. --columns maps other names")
    return values[name]


def _string(values: Mapping[str, Any], name: str) -> str:
    if not isinstance(values[name], str) or not values[name]:
        raise InputError(f"{name} is {values[name]!r:.40}; it must be a text of at least 1 character")
    return values[name]


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"messages is {messages!r:.40}; it must be a list of objects with a role and a content")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index} is {message!r:.60}; it must be an object with a role and a content")
        if message.get("weight", 1) not in (0, 1):
            raise InputError(
                f"message {index} has the weight {message['weight']!r:.40}; it must be 0, not learnt, or 1"
            )
        said = message.get("content") or message.get("tool_calls")
        if message["role"] in SPEAKERS and (not said or (isinstance(said, str) and not said.strip())):
            raise InputError(f"message {index}, of the assistant, is empty")
        if message["role"] not in SPEAKERS and "content" not in message:
            raise InputError(f"message {index}, of the role {message['role']!r}, lacks 'content'")
