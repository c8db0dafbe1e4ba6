"""A conversation with tools, in whatever dialect it came: to the template's form, and back as text, thoughts, calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemmakit.serve.protocol import AllowedChoice, Message, NamedTool, Tool
from gemmakit.serve.refusals import Refusal
from gemmakit.text.answer_grammar import answer_grammar
from gemmakit.text.response import ResponseParser, Thought

ToolChoice = str | NamedTool | AllowedChoice | None


@dataclass(frozen=True)
class Call:
    """A call that the model wrote."""

    id: str
    name: str
    arguments: dict[str, Any]

    @property
    def json_arguments(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)


Part = str | Thought | Call


class Reader:
    """Takes an answer as it comes and gives text, thoughts and calls.

    parser: None where an answer is text and nothing else. parallel: whether there may be more than one call.
    thought_tokens: how many tokens thoughts took.
    """

    def __init__(self, parser: ResponseParser | None = None, parallel: bool = True):
        self._parser, self.parallel = parser, parallel
        self.called = False
        self.thought_tokens = 0

    def push(self, token: int | None, text: str, last: bool) -> list[Part]:
        if self._parser is None:
            return [text] if text else []
        thought = self._parser.thinking
        parts = self._parser.push([] if token is None else token, text)
        self.thought_tokens += token is not None and (thought or self._parser.thinking)
        found: list[Part] = []
        for part in [*parts, *(self._parser.finish() if last else ())]:
            if self.called and not self.parallel:
                break
            if isinstance(part, dict):
                self.called = True
                found.append(Call(f"call_{secrets.token_hex(12)}", part["name"], part["arguments"]))
            else:
                found.append(part)
        return found


@dataclass(frozen=True)
class ToolUse:
    """Which tools a conversation has. told: what the template is told of them, None where nothing may be called.

    forced: those of which one must be called; None where the model decides. parallel: whether there may be several
    calls. strict: the names of those whose schema is followed wherever they are called.
    """

    told: list[dict[str, Any]] | None = None
    forced: list[dict[str, Any]] | None = None
    parallel: bool = True
    strict: frozenset[str] = frozenset()

    def grammar(self, tokenizer: Any, prompt: Sequence[int], thought: bool, schema: Any = None) -> str | None:
        """What an answer must be; None where it may be anything, or what its schema alone says.

        thought: whether the model may think before it answers. schema: of an answer that calls nothing.
        """
        parser = ResponseParser(tokenizer, prompt=prompt)
        how: dict[str, Any] = {"parallel": self.parallel, "thought": thought, "thinking": parser.thinking}
        try:
            if self.forced is not None:
                return answer_grammar(tokenizer, self.forced, **how)
            tools = [self._as_called(tool) for tool in self.told or ()]
            if schema is not None and (tools or thought or parser.thinking):
                schema = schema if isinstance(schema, dict) else {}
                return answer_grammar(tokenizer, tools, must_call=False, schema=schema, **how)
            if self.strict:
                return answer_grammar(tokenizer, tools, must_call=False, **how)
        except RecursionError:
            raise Refusal(400, "the tools' parameters are nested too deep to be followed.", param="tools") from None
        return None

    def _as_called(self, tool: dict[str, Any]) -> dict[str, Any]:
        """A tool that may be called with anything, unless it is strict."""
        function = tool["function"]
        if function["name"] in self.strict:
            return tool
        return {"function": {"name": function["name"], "parameters": {"type": "object"}}}


def chosen_tools(tools: Sequence[Tool] | None, choice: ToolChoice, parallel: bool, can: bool) -> ToolUse:
    """can: whether the template has a word for tools.

    Raises Refusal for tools where it has not, and for a choice of what there is not.
    """
    named = _named(choice)
    if not tools and (named or choice == "required"):
        raise Refusal(400, "tool_choice asks for a call, but there are no tools.", param="tool_choice")
    if not tools or choice == "none":
        return ToolUse()
    if not can:
        raise Refusal(
            400, "this model's chat template knows no tools: leave tools out.", param="tools", code="unsupported"
        )
    told = [tool.model_dump(exclude_none=True, include={"type": True, "function": _FUNCTION}) for tool in tools]
    if absent := named - {tool.function.name for tool in tools}:
        raise Refusal(400, f"tool_choice names {min(absent)!r:.80}, which is none of the tools.", param="tool_choice")
    may = [tool for tool in told if tool["function"]["name"] in named] if named else told
    if isinstance(choice, AllowedChoice):  # who may call nothing else is told of nothing else
        told = may
    mode = choice.allowed_tools.mode if isinstance(choice, AllowedChoice) else choice
    must = mode == "required" or isinstance(mode, NamedTool)
    strict = frozenset(tool.function.name for tool in tools if tool.function.strict)
    return ToolUse(told, may if must else None, parallel, strict)


def _named(choice: ToolChoice) -> set[str]:
    """The names that a choice names."""
    named = choice.allowed_tools.tools if isinstance(choice, AllowedChoice) else [choice]
    return {tool.function.name for tool in named if isinstance(tool, NamedTool)}


_FUNCTION = {"name", "description", "parameters"}
# An effort that is none; any other one lets a model think that can.
NO_EFFORT = ("none", "minimal")


def template_variables(given: Mapping[str, Any] | None, thinks: bool | None, can: bool) -> dict[str, Any]:
    """What else the template is told. given: chat_template_kwargs; thinks: what the dialect's own field says.

    can: whether the template lets its model think.
    """
    found = dict(given or {})
    if thinks is not None and can:
        found.setdefault("enable_thinking", thinks)
    return found


def thinks_by_effort(effort: str | None) -> bool | None:
    return None if effort is None else effort not in NO_EFFORT


def plain_messages(messages: Sequence[Message], has_developer: bool) -> list[dict[str, Any]]:
    """Messages as templates read them: arguments as objects, a tool's answer under the tool's name.

    has_developer: whether the template knows that role; elsewhere it is the system's.
    """
    names: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        plain: dict[str, Any] = message.model_dump(include=_SAID, exclude_none=True)
        if message.role == "developer" and not has_developer:
            plain["role"] = "system"
        if message.tool_calls:
            plain["tool_calls"] = [_call(call, names, place) for call in message.tool_calls]
        if message.role == "tool":
            plain |= {"name": name} if (name := message.name or names.get(message.tool_call_id or "")) else {}
        found.append(plain)
    return found


_SAID = {"role", "content", "name", "tool_call_id", "reasoning", "reasoning_content"}


def _call(call: Any, names: dict[str, str], place: int) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        said = f"the arguments of {call.function.name!r:.80} are no JSON object."
        raise Refusal(400, said, param=f"messages[{place}].tool_calls")
    if call.id:
        names[call.id] = call.function.name
    function = {"name": call.function.name, "arguments": arguments}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})
