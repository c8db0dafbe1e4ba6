"""A model's answer taken apart as it comes: text, thoughts and calls."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from gemmakit.errors import InputError
from gemmakit.text.encoding import to_lists
from gemmakit.text.tools import ToolCall, read_call

_PRIVATE = range(0xE000, 0xF900)
# What a token of the form is.
Kind = Literal["call", "call_end", "quote", "thought", "thought_end"]


@dataclass(frozen=True)
class ResponseForm:
    """The tokens that a model writes around calls, around strings in them, and around thoughts.

    results: with which it ends its part and waits for what came of its calls. turn: with which somebody's turn begins.
    label: what a thought begins with.
    """

    call: str
    call_end: str
    quote: str
    results: str
    turn: str
    thought: str | None = None
    thought_end: str | None = None
    label: str = ""

    @cached_property
    def names(self) -> dict[str, Kind]:
        """What each token means."""
        found: dict[str, Kind] = {self.call: "call", self.call_end: "call_end", self.quote: "quote"}
        if self.thought is not None and self.thought_end is not None:
            found |= {self.thought: "thought", self.thought_end: "thought_end"}
        return found

    def without_thoughts(self, text: str) -> str:
        """A text that holds thoughts by their letters, without them: what a model thought is not told again."""
        if self.thought is None or self.thought not in text:
            return text
        said = (part.split(self.thought)[0] for part in text.split(self.thought_end))
        return "".join(said).strip()


FUNCTION_GEMMA = ResponseForm(
    "<start_function_call>", "<end_function_call>", "<escape>", "<start_function_response>", "<start_of_turn>"
)
GEMMA4 = ResponseForm(
    "<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>", "<|turn>", "<|channel>", "<channel|>", "thought\n"
)
FORMS = (GEMMA4, FUNCTION_GEMMA)


@dataclass(frozen=True)
class Thought:
    """A piece of what a model thought before it said or called something."""

    text: str


Part = str | Thought | ToolCall


class _Mark(NamedTuple):
    """A token of the form. shown: what it adds to a text in which special tokens add nothing. spelled: by letters."""

    kind: Kind
    name: str
    shown: str
    spelled: bool


_Item = str | _Mark


class _Tokens:
    """Ids to their text and the tokens of the form in it, each where it stands.

    Somebody else may decide what the text is, who cuts it at a stop string: a token is told once all text before it is.
    """

    def __init__(self, tokenizer: Any, names: Mapping[str, Kind], turn: str) -> None:
        self._turn = (tokenizer.added_token(turn) or (None,))[0]
        self.marks: dict[int, _Mark] = {}
        for name, kind in names.items():
            if (added := tokenizer.added_token(name)) is not None:
                index, special = added
                self.marks[index] = _Mark(kind, name, "" if special else name, spelled=False)
        self._decoder = tokenizer.incremental_decoder(skip_special_tokens=True)
        self._begin()

    def _begin(self) -> None:
        self._text = ""  # what is told and not yet taken
        self._taken = self._decoded = 0  # characters before it; characters that the decoder gave
        self._passed = 0  # characters to come that are a token's own
        self._cut = False  # whether somebody else decides what the text is
        self._waiting: deque[tuple[int, _Mark]] = deque()  # tokens that were seen, by their place in the text

    def opening(self, prompt: Sequence[int]) -> list[_Item]:
        """The thought that a prompt leaves open in its last turn."""
        for place in range(len(prompt) - 1, -1, -1):
            if prompt[place] == self._turn:
                break
            mark = self.marks.get(prompt[place])
            if mark is not None and mark.kind == "thought":
                return [mark, self._decoder.push(list(prompt[place + 1 :])) + self._decoder.finish()]
            if mark is not None and mark.kind == "thought_end":
                break
        return []

    def push(self, ids: Any, text: str | None) -> Iterator[_Item]:
        if text is not None and not self.marks:
            return iter([text])
        ids = to_lists(ids)
        own = "".join(map(self._decode, [ids] if isinstance(ids, int) else ids))
        self._text += own if text is None else text
        self._cut = self._cut or text is not None
        return self._told()

    def finish(self) -> list[_Item]:
        rest = self._decoder.finish()
        self._text += "" if self._cut else rest
        found = list(self._told())
        self._begin()
        return found

    def _decode(self, index: int) -> str:
        text, mark = self._decoder.push([index]), self.marks.get(index)
        self._decoded += len(text)
        end = self._decoded + len(self._decoder.held)
        if self._waiting and self._waiting[-1][0] > end:  # bytes that made no character alone now do together
            self._waiting = deque((min(place, end), each) for place, each in self._waiting)
        if mark is not None:
            self._waiting.append((end - len(mark.shown), mark))
        return text

    def _told(self) -> Iterator[_Item]:
        self._pass()
        while self._waiting and self._waiting[0][0] <= self._taken + len(self._text):
            place, mark = self._waiting.popleft()
            yield self._take(place - self._taken)
            self._passed += len(mark.shown)
            self._pass()
            yield mark
        yield self._take(len(self._text))

    def _pass(self) -> None:
        self._passed -= len(self._take(self._passed))

    def _take(self, size: int) -> str:
        piece, self._text = self._text[: max(0, size)], self._text[max(0, size) :]
        self._taken += len(piece)
        return piece


class _Letters:
    """Text to itself and the tokens that it spells; the end of it is held back while it may become one."""

    def __init__(self, names: Mapping[str, Kind]) -> None:
        self._marks = {name: _Mark(kind, name, name, spelled=True) for name, kind in names.items()}
        self._any = re.compile("|".join(map(re.escape, sorted(names)))) if names else None
        self._held = ""

    def split(self, items: Iterable[_Item], last: bool = False) -> Iterator[_Item]:
        for item in items:
            if isinstance(item, str) and self._any is not None:
                yield from self._spelled(item, self._any)
                continue
            yield from self._rest()
            yield item
        if last:
            yield from self._rest()

    def _rest(self) -> Iterator[str]:
        held, self._held = self._held, ""
        if held:
            yield held

    def _spelled(self, text: str, any_: re.Pattern[str]) -> Iterator[_Item]:
        text, place = self._held + text, 0
        for found in any_.finditer(text):
            yield text[place : found.start()]
            yield self._marks[found[0]]
            place = found.end()
        end = self._beginning(text, place)
        self._held = text[end:]
        yield text[place:end]

    def _beginning(self, text: str, place: int) -> int:
        """Where a token may be beginning at the end of `text[place:]`."""
        longest = max(map(len, self._marks)) - 1
        sizes = range(min(longest, len(text) - place), 0, -1)
        open_ = (size for size in sizes if any(name.startswith(text[-size:]) for name in self._marks))
        return len(text) - next(open_, 0)


class ResponseParser:
    """Takes an answer as it comes and gives text, thoughts and calls, in their order, as soon as they are certain.

    What is given are strings, `Thought`s and calls {"name", "arguments"}. Nothing is lost: a call that is malformed, or
    cut off by the end, is given as the text that it is. A token that the vocabulary has is that token alone: where a
    model writes its letters, as it does when it repeats what somebody told it to, they are text. Where the vocabulary
    has none, and in answers that come as text, letters count.

    Args:
        tokenizer: of the model, for an answer that comes as ids; None for one that comes as text.
        form: of the answer; the tokenizer's own unless given.
        prompt: the ids that the answer follows, which may have begun a thought.
        calls: False where nothing may be called: calls are then text.
        strict: raise InputError for a call that is malformed or has no end.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        form: ResponseForm | None = None,
        prompt: Sequence[int] = (),
        calls: bool = True,
        strict: bool = False,
    ) -> None:
        if form is None and tokenizer is None:
            raise InputError("a parser of text needs to know its form: pass form=, or the tokenizer.")
        self.form: ResponseForm = tokenizer.response_form if form is None else form
        self._strict = strict
        names: dict[str, Kind] = {n: k for n, k in self.form.names.items() if calls or k in ("thought", "thought_end")}
        self._tokens = None if tokenizer is None else _Tokens(tokenizer, names, self.form.turn)
        known = () if self._tokens is None else [mark.name for mark in self._tokens.marks.values()]
        self._letters = _Letters({name: kind for name, kind in names.items() if name not in known})
        self._opening = [] if self._tokens is None else self._tokens.opening(prompt)
        self._begin()

    def _begin(self) -> None:
        self._thinking = False
        self._label = ""  # what may still be the beginning of the label, once a thought has begun
        self._labelled = True
        self._newline = False  # held back: the last one of a thought belongs to its end
        self._call: list[_Item] | None = None
        self._quoted = False
        self._parts(self._opening)

    @property
    def thinking(self) -> bool:
        """Whether a thought goes on."""
        return self._thinking

    def push(self, new: Any, text: str | None = None) -> list[Part]:
        """Take what is new: an id or some, with a tokenizer; text without.

        text: what is certain of the ids' text where somebody else decides it, such as stop strings; None for all of it.
        """
        items = [new] if self._tokens is None else self._tokens.push(new, text)
        return _joined(self._parts(self._letters.split(items)))

    def finish(self) -> list[Part]:
        """What was held back. The parser can be used again afterwards, for an answer to a like prompt."""
        items = [] if self._tokens is None else self._tokens.finish()
        parts = [*self._parts(self._letters.split(items, last=True)), *self._ended()]
        self._begin()
        return _joined(parts)

    def _parts(self, items: Iterable[_Item]) -> list[Part]:
        return [part for item in items for part in self._take(item)]

    def _take(self, item: _Item) -> list[Part]:
        if self._call is not None:
            return self._in_call(self._call, item)
        if isinstance(item, str):
            return self._said(item) if item else []
        if item.kind == "call":
            begun: list[_Item] = [item]
            self._call, self._quoted = begun, False
            return []
        if item.kind == "thought" and not self._thinking:
            self._thinking, self._labelled, self._label = True, False, ""
            return []
        if item.kind == "thought_end" and self._thinking:
            self._thought_over()
            return []
        return self._said(item.shown)

    def _in_call(self, call: list[_Item], item: _Item) -> list[Part]:
        if isinstance(item, str) or item.kind == "quote":
            self._quoted ^= not isinstance(item, str)
            call.append(item)
            return []
        if item.spelled and (self._quoted or item.kind != "call_end"):  # letters are whatever a string says
            call.append(item.name)
            return []
        self._call = None
        if item.kind == "call_end":
            return self._called([*call, item])
        return [*self._uncalled(call), *self._take(item)]

    def _called(self, call: list[_Item]) -> list[Part]:
        body = call[1:-1]
        text = "".join(item for item in body if isinstance(item, str))
        quote = self.form.quote
        if quote in text:  # letters of it, which are not the token
            quote = next((chr(code) for code in _PRIVATE if chr(code) not in text), quote)
        try:
            return [read_call("".join(item if isinstance(item, str) else quote for item in body), quote)]
        except InputError:
            if self._strict:
                raise
            return self._uncalled(call)

    def _uncalled(self, call: list[_Item]) -> list[Part]:
        text = "".join(item if isinstance(item, str) else item.name for item in call)
        if self._strict:
            raise InputError(f"{text[:80]!r} is a call without its end, {self.form.call_end}.")
        return self._said(text)

    def _said(self, text: str) -> list[Part]:
        """Text, or a thought where one goes on."""
        if not self._thinking:
            return [text] if text else []
        if not self._labelled:
            self._label += text
            if self.form.label.startswith(self._label) and self._label != self.form.label:
                return []
            text, self._labelled = self._label.removeprefix(self.form.label), True
        if not text:
            return []
        text = "\n" + text if self._newline else text
        self._newline = text.endswith("\n")
        return [Thought(text.removesuffix("\n"))] if text != "\n" else []

    def _thought_over(self) -> None:
        self._thinking = self._newline = False
        self._labelled = True

    def _ended(self) -> list[Part]:
        found: list[Part] = []
        if self._call is not None:
            call, self._call = self._call, None
            found += self._uncalled(call)
        return [*found, Thought("\n")] if self._newline else found


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Pieces of text, and of thoughts, that follow one another as one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, str) and isinstance(last, str):
            found[-1] = last + part
        elif isinstance(part, Thought) and isinstance(last, Thought):
            found[-1] = Thought(last.text + part.text)
        else:
            found.append(part)
    return found


def message_of(parts: Sequence[Part]) -> dict[str, Any]:
    """An answer's parts as a message that a conversation goes on with; `reasoning` and `tool_calls` where there are
    any.
    """
    message: dict[str, Any] = {"role": "assistant", "content": "".join(p for p in parts if isinstance(p, str))}
    if thoughts := "".join(part.text for part in parts if isinstance(part, Thought)):
        message["reasoning"] = thoughts
    if calls := [{"type": "function", "function": part} for part in parts if isinstance(part, dict)]:
        message["tool_calls"] = calls
    return message


def parse_tool_calls(text: str) -> list[ToolCall]:
    """The calls in a model's text, in their order: [{"name": ..., "arguments": {...}}].

    They are written as Gemma 4 does, `<|tool_call>call:f{x:1,y:<|"|>a<|"|>}<tool_call|>`, or FunctionGemma,
    `<start_function_call>call:f{x:1,y:<escape>a<escape>}<end_function_call>`; text and thoughts around them are passed
    over. Raises InputError for a call that is malformed or has no end.
    """
    begun = {place: form for form in FORMS if (place := text.find(form.call)) >= 0}
    if not begun:
        return []
    parser = ResponseParser(form=begun[min(begun)], strict=True)
    return [part for part in (*parser.push(text), *parser.finish()) if isinstance(part, dict)]
