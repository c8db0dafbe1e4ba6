"""Conversations to ids: Gemma's turns, any checkpoint's template, and no forged turns."""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gemmakit.errors import InputError, TemplateError
from gemmakit.text.calling import DEFAULTS, split_after
from gemmakit.text.encoding import BatchEncoding, Part, to_lists
from gemmakit.text.response import FORMS, FUNCTION_GEMMA, ResponseForm, ResponseParser, message_of
from gemmakit.text.spans import assistant_mask, assistant_spans
from gemmakit.text.tools import tool_schema
from gemmakit.text.vocabulary import LATER_TURN_TOKENS, TURN_TOKENS, Engine

# Google's turns. What differs from the template in the released files: a system message is folded into the first user
# turn instead of being refused, roles are checked by name, and a content may be a list of text parts.
GEMMA_TEMPLATE = """\
{%- macro text(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] != 'text' -%}
                {{- raise_exception('Gemma reads text only, found a part of type ' ~ part['type']) -}}
            {%- endif -%}
            {{- part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set turns = messages -%}
{%- set before = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- if system is defined and system == 'refuse' -%}
        {{- raise_exception('Gemma has no system role: put the instructions into the first user message') -}}
    {%- endif -%}
    {%- set before = text(messages[0]) + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
    {%- if not turns -%}
        {{- raise_exception('a system message alone is no conversation: a user message must follow') -}}
    {%- endif -%}
{%- endif -%}
{%- for message in turns -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- set expected = 'user' if loop.index0 % 2 == 0 else 'model' -%}
    {%- if role != expected -%}
        {{- raise_exception('roles must alternate user, assistant, user, ...: message ' ~ loop.index
            ~ ' (not counting a system message) has the role ' ~ message['role']) -}}
    {%- endif -%}
    {{- '<start_of_turn>' + role + '\\n' + (before if loop.first else '') + text(message) + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""

_PRIVATE = range(0xE000, 0xF900)
_MAX_DEPTH = 32
# By which names a message may have what its model thought.
THOUGHTS = ("reasoning", "reasoning_content", "thinking")
# A template that reads messages of the role "tool"; older ones of Gemma 4 want results inside the message that called.
_TOOL_ROLE = re.compile(r"""role['"]?\]?\s*[!=]=\s*['"]tool['"]""")


class Chat:
    """`apply_chat_template` and what it needs."""

    _engine: Engine
    _add_bos_token: bool
    chat_template: Any

    @property
    def end_of_turn_id(self) -> int | None:
        """The id that ends a turn, or None where the vocabulary has no turns."""
        found = (self._engine.token_to_id(turn[1]) for turn in (LATER_TURN_TOKENS, TURN_TOKENS))
        return next((index for index in found if index is not None), None)

    @property
    def response_form(self) -> ResponseForm:
        """How the model writes calls and thoughts: by the tokens of its vocabulary, or by those of its template."""
        known = next((form for form in FORMS if self._engine.token_to_id(form.call) is not None), None)
        template = str(self.chat_template)
        return known or next((form for form in FORMS if form.call in template), FUNCTION_GEMMA)

    @property
    def answer_ends(self) -> list[int]:
        """The ids that end an answer in a chat: that of a turn's end, and with which a model waits for results."""
        waits = self._engine.token_to_id(self.response_form.results)
        return [index for index in (self.end_of_turn_id, waits) if index is not None]

    def parse_response(self: Any, response: Any, *, prefix: Any = None, calls: bool = True) -> Any:
        """An answer as the message that a conversation goes on with.

        response: the ids that were generated, or their text with special tokens; a list of either gives a list.
        prefix: the prompt in the same kind, or one for each of a list: it may have begun a thought. calls: False where
        nothing may be called.

        Returns {"role": "assistant", "content": ...}, with "reasoning" where the model thought aloud, and "tool_calls"
        where it called something. A call that is malformed or cut off is part of the content.
        """
        response, prefix = to_lists(response), to_lists(prefix)
        if isinstance(response, list) and response and not isinstance(response[0], int):
            each = prefix if isinstance(prefix, list) and prefix and not isinstance(prefix[0], int) else None
            prefixes = [prefix] * len(response) if each is None else each
            pairs = zip(response, prefixes, strict=True)
            return [self.parse_response(one, prefix=before, calls=calls) for one, before in pairs]
        if not isinstance(response, str):
            parser = ResponseParser(self, prompt=prefix or (), calls=calls)
            return message_of([*parser.push(response), *parser.finish()])
        parser = ResponseParser(form=self.response_form, calls=calls)
        parser.push(prefix or "")
        ends = [self.eos_token, *self.convert_ids_to_tokens(self.answer_ends)]
        while end := next((end for end in ends if end and response.rstrip().endswith(end)), None):
            response = response.rstrip().removesuffix(end)
        return message_of([*parser.push(response), *parser.finish()])

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template in use: `chat_template` (a source, or one name of several), the tokenizer's, or Gemma's own."""
        own = self.chat_template
        if isinstance(own, Mapping):
            if chat_template in own:
                return own[chat_template]
            if chat_template is None:
                name = "tool_use" if tools is not None and "tool_use" in own else "default"
                if name not in own:
                    raise InputError(f"there are several chat templates, {sorted(own)}; name one with chat_template=.")
                return own[name]
        return chat_template or (own if isinstance(own, str) else None) or GEMMA_TEMPLATE

    def template_reads(self, variable: str) -> bool:
        """Whether the chat template reads a variable, such as "tools" or "enable_thinking"."""
        from gemmakit.text.sandbox import names_in  # late: it loads Jinja

        return variable in names_in(self.get_chat_template(tools=[]))

    def apply_chat_template(
        self: Any,
        conversation: Any,
        tools: Sequence[Callable[..., Any] | Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        system: str = "fold",
        **template_variables: Any,
    ) -> Any:
        """Write a conversation in the model's turns.

        conversation: a list of `{"role": ..., "content": ...}`, or a list of such lists. Roles alternate between user
        and assistant; a system message may come first: it is put in front of the first user message, or refused with
        `system="refuse"`. A content may be a list of `{"type": "text", "text": ...}`: to every template it is the text
        of its parts, each without the spaces around it where there are several.
        An assistant's message may have `reasoning`, what it thought, and `tool_calls`; a message of the role "tool"
        has what came of one. Which old thoughts a model is told again, the template decides.
        tools: what the model may call: Python functions with a docstring, or JSON schemas (`tools.tool_schema`).
        template_variables: whatever else the template reads, such as enable_thinking=True for Gemma 4.
        add_generation_prompt: end with the opening of the model's turn.
        continue_final_message: leave the last message open so that the model goes on with it.
        return_assistant_tokens_mask: add `assistant_masks`, 1 for what the assistant says in each of its turns and for
        the token that ends it: what is generated after the prompt of that turn. Any template does. A message with
            "weight": 0 is left out, as in the files of OpenAI's fine-tuning.
        Returns a BatchEncoding; ids alone with `return_dict=False`; text with `tokenize=False`.

        Special tokens inside messages, tools, documents and template variables are encoded as plain text: they cannot
        end a turn or begin one. That holds for ids only; text from `tokenize=False` has lost the difference.
        Raises TemplateError where the template is malformed, unsafe, too slow, or refuses the conversation.
        """
        if continue_final_message and add_generation_prompt:
            raise InputError("continue_final_message and add_generation_prompt exclude each other.")
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise InputError("return_assistant_tokens_mask marks ids: leave tokenize=False and return_dict=False out.")
        if system not in ("fold", "refuse"):
            raise InputError(f"system is {system!r}; it must be 'fold' or 'refuse'.")
        chats, batched = _chats(conversation)
        source = self.get_chat_template(chat_template, tools)
        if source == GEMMA_TEMPLATE and self._engine.token_to_id(TURN_TOKENS[1]) is None:
            raise InputError(
                f"this vocabulary has no {' and '.join(TURN_TOKENS)}, so that Gemma's turns would be mere words to the "
                "model. Pass the checkpoint's own template as chat_template=."
            )
        chats = [_as_read(chat, source, self.response_form) for chat in chats]
        variables = {"tools": self._schemas(tools, source), "documents": documents, **template_variables}
        marks = _Marks(self, source, [chats, variables]) if tokenize else None
        settled = {**self.special_tokens_map, "add_generation_prompt": add_generation_prompt, "system": system}
        texts = [_rendered(source, chat, variables, settled, marks, continue_final_message) for chat in chats]
        if marks is None:
            return texts if batched else texts[0]
        encoded = [self._encode_pieces(text.split(marks.cut)) for text in texts]
        if return_assistant_tokens_mask:
            ends = [self._engine.id_to_token(i) for i in (self.end_of_turn_id, self.eos_token_id) if i is not None]
            for chat, text, part in zip(chats, texts, encoded, strict=True):

                def said(messages: list[dict[str, Any]], opened: bool) -> str:
                    told = {**settled, "add_generation_prompt": opened}
                    return _rendered(source, messages, variables, told, marks, False)

                part.learnt = assistant_mask(self, part.ids, assistant_spans(said, chat, text, ends), text, marks.cut)
        parts = [(self._one_bos(part), None) for part in encoded]
        options = {**DEFAULTS, "padding": padding, "truncation": truncation, "max_length": max_length}
        options |= {**(tokenizer_kwargs or {}), "return_tensors": return_tensors, "add_special_tokens": False}
        if set(options) != set(DEFAULTS):
            raise InputError(
                f"tokenizer_kwargs holds {sorted(set(options) - set(DEFAULTS))}, which no tokenizer takes."
            )
        out: BatchEncoding = self._finish(parts, batched, options)
        return out if return_dict else out["input_ids"]

    def _schemas(self: Any, tools: Sequence[Any] | None, source: str) -> list[Mapping[str, Any]] | None:
        from gemmakit.text.sandbox import names_in  # late: it loads Jinja

        if tools and "tools" not in names_in(source):
            self._warn_once("tools", "the chat template says nothing of tools, so the model is not told of them.")
        return None if tools is None else [tool_schema(tool) for tool in tools]

    def _one_bos(self: Any, part: Part) -> Part:
        bos = self.bos_token_id
        if bos is None or not self._add_bos_token:
            return part
        if part.ids[:1] != [bos]:
            self._warn_once("no bos", "the chat template writes no BOS token; Gemma needs one at the start.")
        while part.ids[:2] == [bos, bos]:
            self._warn_once("bos", "the chat template writes more than one BOS token; one is kept.")
            part = part.cut(1, len(part.ids))
        return part


_SETTLED = frozenset(inspect.signature(Chat.apply_chat_template).parameters) | {"messages"}


def free_variables(given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """chat_template_kwargs as `template_variables`. Raises InputError for what the conversation itself decides."""
    if taken := sorted(set(given or ()) & _SETTLED):
        raise InputError(f"chat_template_kwargs has {', '.join(taken)}, which the conversation itself decides.")
    return given or {}


def _chats(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """The conversations as lists of dictionaries, checked, without the keys that are None."""
    batched = (
        isinstance(conversation, (list, tuple)) and bool(conversation) and isinstance(conversation[0], (list, tuple))
    )
    chats = []
    for chat in conversation if batched else [conversation]:
        if not isinstance(chat, (list, tuple)) or not chat:
            raise InputError("a conversation must be a list of at least one message {'role': ..., 'content': ...}.")
        for index, message in enumerate(chat):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(f"message {index} must be a dictionary with a role, found {message!r:.80}.")
        chats.append([_message(message, index) for index, message in enumerate(chat)])
    return chats, batched


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message without the keys that are None, its content as text where it is a list of parts.

    What is neither is refused here: each template makes something else of it, and most make it part of the prompt.
    """
    found = {key: value for key, value in message.items() if value is not None}
    content = found.get("content")
    _check_content(message["role"], content, {*found} - {"role", "content"}, index)
    # What a tool gave back may be data of any kind; templates that know tools write it out.
    if isinstance(content, (list, tuple)) and not (message["role"] == "tool" and not any(map(_has_type, content))):
        texts = [_text(part, index) for part in content]
        found["content"] = texts[0] if len(texts) == 1 else "".join(text.strip() for text in texts)
    return found


def _check_content(role: str, content: Any, others: set[str], index: int) -> None:
    """Raises TemplateError. others: what else the message has, an answer's tool_calls for instance."""
    if isinstance(content, str) or role == "tool":
        return
    if content is None and role in ("assistant", "model") and others:
        return
    if not isinstance(content, (list, tuple)) or not content:
        found = "no content" if content is None or content == [] else f"the content {content!r:.80}"
        raise TemplateError(
            f"message {index} has {found}; it must be a text, or a list of {{'type': 'text', 'text': ...}}. "
            "Leave the message out if nothing was said."
        )


def _as_read(chat: list[dict[str, Any]], source: str, form: ResponseForm) -> list[dict[str, Any]]:
    """The messages as the template reads them: thoughts under each of its names, and never in the content."""
    found = [_with_thoughts(message, form) for message in chat]
    return found if "tool_responses" not in source or _TOOL_ROLE.search(source) else _with_results(found)


def _with_thoughts(message: dict[str, Any], form: ResponseForm) -> dict[str, Any]:
    if message["role"] not in ("assistant", "model"):
        return message
    content, thought = message.get("content"), next((message[name] for name in THOUGHTS if message.get(name)), None)
    found = message if thought is None else {**message, **dict.fromkeys(THOUGHTS, thought)}
    # Its template drops them too, but sees no token in a guarded text.
    return {**found, "content": form.without_thoughts(content)} if isinstance(content, str) else found


def _with_results(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What tools gave back, and what was said of it next, inside the message that called them."""
    found: list[dict[str, Any]] = []
    caller: dict[str, Any] | None = None
    for message in chat:
        results: list[Any] = [] if caller is None else caller.get("tool_responses", [])
        if caller is not None and message["role"] == "tool":
            names = {call.get("id"): call["function"]["name"] for call in caller["tool_calls"]}
            name = message.get("name") or names.get(message.get("tool_call_id"), "unknown")
            caller["tool_responses"] = [*results, {"name": name, "response": message.get("content")}]
        elif caller is not None and results and not caller.get("content") and _only_says(message):
            caller["content"], caller = message.get("content"), None
        else:
            found.append(dict(message))
            caller = found[-1] if message.get("tool_calls") else None
    return found


def _only_says(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls")


def _has_type(part: Any) -> bool:
    return isinstance(part, Mapping) and "type" in part


def _text(part: Any, index: int) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = f"a part of type {kind!r}" if isinstance(kind, str) and kind != "text" else f"the part {part!r:.80}"
    raise TemplateError(
        f"message {index} holds {found}, but gemmakit reads text only: parts are {{'type': 'text', 'text': ...}}. "
        "Leave it out, or say in words what it shows."
    )


def _rendered(
    source: str,
    chat: list[dict[str, Any]],
    variables: Mapping[str, Any],
    settled: Any,
    marks: _Marks | None,
    open_: bool,
) -> str:
    from gemmakit.text.sandbox import TemplateRefused  # late: it loads Jinja

    def attempt(chat: list[dict[str, Any]]) -> str:
        return (_render_open if open_ else _render)(source, chat, variables, settled, marks)

    try:
        return attempt(chat)
    except TemplateRefused as error:
        folded = _folded(chat) if settled["system"] == "fold" and source != GEMMA_TEMPLATE else None
        if folded is None:
            raise TemplateError(f"the chat template refuses this conversation: {error}") from None
    return attempt(folded)


def _folded(chat: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The system message in front of the first user message, for a template that has no system role."""
    if chat[0]["role"] != "system" or len(chat) < 2 or chat[1]["role"] != "user":
        return None
    first, second = chat[0].get("content"), chat[1].get("content")
    if not isinstance(first, str) or not isinstance(second, str):
        return None
    return [{**chat[1], "content": f"{first.strip()}\n\n{second.strip()}"}, *chat[2:]]


def _render(source: str, chat: Any, variables: Any, settled: Any, marks: _Marks | None) -> str:
    from gemmakit.text.sandbox import render  # late: it loads Jinja

    def guard(text: str) -> str:
        return marks.guard(text) if marks else text

    return render(source, {**_plain(variables, guard), **settled, "messages": _plain(chat, guard)})


def _render_open(source: str, chat: list[dict[str, Any]], variables: Any, settled: Any, marks: _Marks | None) -> str:
    """Render and cut right after the last message's content.

    The stop sign is followed by a space: where the template trims, the space is gone, and so must be the message's own,
    but not those that the template writes.
    """
    last = chat[-1].get("content")
    if not isinstance(last, str):
        raise InputError("continue_final_message needs a last message whose content is a string.")
    stop = _fresh(_characters([chat, variables, source]) | ({marks.cut} if marks else set()))
    text = _render(source, [*chat[:-1], {**chat[-1], "content": f"{last}{stop} "}], variables, settled, marks)
    place = text.rfind(stop)
    if place < 0:
        raise TemplateError("the chat template leaves out the last message, so it cannot be continued.")
    if text[place + 1 : place + 2] == " ":
        return text[:place]
    if last and not last.strip():  # what of it was on the other side of the stop sign is gone already
        return _render_open(source, [*chat[:-1], {**chat[-1], "content": ""}], variables, settled, marks)
    return text[:place].removesuffix(last[len(last.rstrip()) :])


class _Marks:
    """A character that occurs nowhere in the input, put inside whatever could pass for a special token.

    Text is cut at the marks before it is encoded, and a token never reaches over a cut. One character is enough: it
    cannot be halved, no case change touches it, and no trimming removes it. Which one it is changes with every call.
    """

    def __init__(self, tokenizer: Any, source: str, inputs: Any) -> None:
        added = tokenizer._engine.added
        self.cut = _fresh(_characters([source, inputs]).union(*added.structural))
        self._starts, self._heads = added.structural_starts, added.structural_heads
        self._longest = max(map(len, added.structural), default=0)

    def guard(self, text: str) -> str:
        """`text` with a mark after the first character of each token in it, and of a token that it only begins."""
        text = self._marked(text)
        body = text.rstrip()
        for size in range(min(self._longest, len(body)), 0, -1):
            place = len(body) - size
            if body[place:] in self._heads:
                return f"{text[: place + 1]}{self.cut}{text[place + 1 :]}"
        return text

    def _marked(self, text: str) -> str:
        return self.cut.join(split_after(text, self._starts))


def _fresh(taken: set[str]) -> str:
    free = [code for code in _PRIVATE if chr(code) not in taken]
    if not free:
        raise InputError("the conversation uses every private-use character of Unicode; none is left to mark it with.")
    return chr(secrets.choice(free))


def _characters(value: Any) -> set[str]:
    found: set[str] = set()
    for text in _strings(value):
        found.update(text)
    return found


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise InputError(f"messages are nested more than {_MAX_DEPTH} deep.")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key, depth + 1)
            yield from _strings(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, depth + 1)


def _plain(value: Any, guard: Any, depth: int = 0) -> Any:
    """A copy made of dictionaries, lists, strings and numbers only, with every string guarded."""
    if depth > _MAX_DEPTH:
        raise InputError(f"messages are nested more than {_MAX_DEPTH} deep.")
    if isinstance(value, str):
        return guard(str(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {guard(str(key)): _plain(item, guard, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, guard, depth + 1) for item in value]
    raise InputError(f"a {type(value).__name__} cannot be given to a chat template; text, numbers and lists can.")
