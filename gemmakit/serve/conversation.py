"""A conversation with tools, in whatever dialect it came: to the template's form, and back as text and calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemmakit.serve.protocol import Message, NamedTool, Tool
from gemmakit.serve.refusals import Refusal
from gemmakit.text.tools import ToolCallParser

ToolChoice = str | NamedTool | None


@dataclass(frozen=True)
class Call:
    """A call that the model wrote."""

    id: str
    name: str
    arguments: dict[str, Any]

    @property
    def json_arguments(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)


class Reader:
    """Takes an answer's text as it comes and gives text and calls. parallel: whether there may be more than one."""

    def __init__(self, tools: bool, parallel: bool = True):
        self._parser = ToolCallParser() if tools else None
        self.parallel = parallel
        self.called = False

    def push(self, text: str, last: bool) -> list[str | Call]:
        if self._parser is None:
            return [text] if text else []
        parts = [*self._parser.push(text), *(self._parser.finish() if last else ())]
        found: list[str | Call] = []
        for part in parts:
            if self.called and not self.parallel:
                break
            if isinstance(part, str):
                found.append(part)
            else:
                self.called = True
                found.append(Call(f"call_{secrets.token_hex(12)}", part["name"], part["arguments"]))
        return found


def told_tools(tools: Sequence[Tool] | None, choice: ToolChoice, can: bool) -> list[dict[str, Any]] | None:
    """What the template is told of tools; None where there are none, or none may be called.

    can: whether it has a word for them. Raises Refusal for tools where it has not, and for a call that must be made:
    the model decides.
    """
    if choice is not None and choice not in ("auto", "none"):
        said = "a call cannot be forced: leave tool_choice at auto and say in words what is to be called."
        raise Refusal(400, said, param="tool_choice", code="unsupported")
    if not tools or choice == "none":
        return None
    if not can:
        raise Refusal(
            400, "this model's chat template knows no tools: leave tools out.", param="tools", code="unsupported"
        )
    return [tool.model_dump(exclude_none=True, include={"type": True, "function": _FUNCTION}) for tool in tools]


_FUNCTION = {"name", "description", "parameters"}


def plain_messages(messages: Sequence[Message], has_developer: bool) -> list[dict[str, Any]]:
    """Messages as templates read them: arguments as objects, a tool's answer under the tool's name.

    has_developer: whether the template knows that role; elsewhere it is the system's.
    """
    names: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        plain: dict[str, Any] = message.model_dump(include={"role", "content", "name"}, exclude_none=True)
        if message.role == "developer" and not has_developer:
            plain["role"] = "system"
        if message.tool_calls:
            plain["tool_calls"] = [_call(call, names, place) for call in message.tool_calls]
        if message.role == "tool":
            plain |= {"name": name} if (name := message.name or names.get(message.tool_call_id or "")) else {}
        found.append(plain)
    return found


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
