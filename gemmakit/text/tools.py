"""Tools: Python functions as the JSON schemas that templates show a model, and a call it writes, read back."""

from __future__ import annotations

import inspect
import json
import math
import re
import textwrap
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gemmakit.errors import InputError

Schema = dict[str, Any]
ToolCall = dict[str, Any]

_MAX_DEPTH = 32
_NONE: Any = type(None)
_SCALARS: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", _NONE: "null"}
_PLAIN: dict[Any, str] = {**_SCALARS, list: "array", tuple: "array", dict: "object"}
# A section of a docstring: its name, and the lines under it that are indented.
_SECTION = re.compile(r"^(Args|Returns|Raises):[ \t]*\n((?:[ \t]+.*\n?|\n)*)", re.MULTILINE)
_NAME = r"([*\w]+)[ \t]*(?:\([^)\n]*\))?:"
_CHOICES = re.compile(r"\(choices:\s*(\[.*\])\s*\)$", re.IGNORECASE | re.DOTALL)


# -- functions to schemas ----------------------------------------------------------------------------------------------


def tool_schema(tool: Callable[..., Any] | Mapping[str, Any]) -> Mapping[str, Any]:
    """What a template is told of a tool.

    tool: a JSON schema, which is given back as it is, or a function with a docstring in Google's style whose arguments
    all have a type and, under `Args:`, a description: str, int, float, bool, None, Any, list, tuple, dict, Literal,
    Enum, and unions of them. `(choices: ["a", "b"])` at the end of a description allows these values only.

    Returns {"type": "function", "function": {"name", "description", "parameters", "return"}}, the last where the
    function says what it returns. Raises InputError for what a schema cannot say.
    """
    if isinstance(tool, Mapping):
        return tool
    name = getattr(tool, "__name__", type(tool).__name__)
    if not callable(tool):
        raise InputError(f"a tool must be a function or a JSON schema in a dictionary, found {tool!r:.80}.")
    description, told, returned = _docstring(tool, name)
    hints = _hints(tool, name)
    properties: dict[str, Schema] = {}
    required: list[str] = []
    for parameter in _parameters(tool, name):
        if parameter.name not in hints or parameter.name not in told:
            lacks = "type" if parameter.name not in hints else "description under Args: in its docstring"
            raise InputError(f"{name}: the argument {parameter.name} has no {lacks}. {_REMEDY}")
        schema, text = _type(hints[parameter.name], f"{name}: {parameter.name}"), told[parameter.name]
        choices = _CHOICES.search(text)
        if choices:
            schema["enum"], text = _choices(choices[1], f"{name}: {parameter.name}"), text[: choices.start()].rstrip()
        properties[parameter.name] = {**schema, "description": text}
        required += [parameter.name] if parameter.default is parameter.empty else []
    parameters = {"type": "object", "properties": properties, **({"required": required} if required else {})}
    function: Schema = {"name": name, "description": description, "parameters": parameters}
    function |= _returned(hints, returned, name)
    return {"type": "function", "function": function}


_REMEDY = "Add it, or describe the tool by a JSON schema in a dictionary."


def _parameters(tool: Any, name: str) -> list[inspect.Parameter]:
    try:
        found = list(inspect.signature(tool).parameters.values())
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} does not say which arguments it takes: {error}. {_REMEDY}") from None
    receiver = found and found[0].name in ("self", "cls") and found[0].annotation is inspect.Parameter.empty
    return found[1:] if receiver else found


def _hints(tool: Any, name: str) -> dict[str, Any]:
    try:
        return get_type_hints(tool)
    except Exception as error:  # whatever evaluating an annotation may raise
        raise InputError(f"the types of {name} cannot be looked up: {type(error).__name__}: {error}.") from error


def _docstring(tool: Any, name: str) -> tuple[str, dict[str, str], str | None]:
    """The description, each argument's description, and that of what is returned."""
    text = (inspect.getdoc(tool) or "").strip()
    if not text:
        raise InputError(f"{name} has no docstring, so no model can know what it does. {_REMEDY}")
    first = _SECTION.search(text)
    sections = {match[1]: textwrap.dedent(match[2]).strip() for match in _SECTION.finditer(text)}
    entries = re.split(rf"^{_NAME}", sections.get("Args", ""), flags=re.MULTILINE)
    told = {name.lstrip("*"): " ".join(words.split()) for name, words in zip(entries[1::2], entries[2::2], strict=True)}
    return text[: first.start() if first else None].strip(), told, sections.get("Returns")


def _returned(hints: Mapping[str, Any], text: str | None, name: str) -> Schema:
    if "return" not in hints:
        return {}
    try:
        schema = _type(hints["return"], name)
    except InputError:
        return {}  # a model never writes it, so that it is not needed to call the tool
    return {"return": {**schema, **({"description": text} if text else {})}}


def _type(hint: Any, where: str) -> Schema:
    """The JSON schema of a type."""
    origin: Any = get_origin(hint)
    inner: list[Any] = list(get_args(hint))
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _values([member.value for member in hint], where)
    if origin is Literal:
        return _values(inner, where)
    if origin in (Union, types.UnionType):
        return _union([_type(each, where) for each in inner if each is not _NONE], _NONE in inner)
    if origin in (list, tuple, dict) and not inner:
        return {"type": _PLAIN[origin]}
    if origin is list:
        return {"type": "array", "items": _type(inner[0], where)}
    if origin is tuple and len(inner) > 1 and ... not in inner:
        return {"type": "array", "prefixItems": [_type(each, where) for each in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(inner[-1], where)}
    raise InputError(f"{where} has the type {hint!r}, which no JSON schema says. {_REMEDY}")


def _values(values: list[Any], where: str) -> Schema:
    kinds = list(dict.fromkeys(_SCALARS.get(type(value), "") for value in values))
    if not values or "" in kinds:
        raise InputError(f"{where} allows the values {values!r}; at least one is needed, all of them JSON scalars.")
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(kinds: list[Schema], nullable: bool) -> Schema:
    if len(kinds) == 1:
        found = kinds[0]
    elif all(kind.keys() == {"type"} for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found = {"anyOf": kinds}
    return {**found, "nullable": True} if nullable else found


def _choices(text: str, where: str) -> list[Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: the choices {text!r} are not a JSON list: {error}.") from None


# -- a call read back -----------------------------------------------------------------------------------------------


def read_call(body: str, quote: str) -> ToolCall:
    """The call that `call:f{x:1,y:"a"}` is, its strings inside a `quote` on either side.

    Raises InputError where it is malformed.
    """
    head = re.match(r"\s*call:\s*([\w.\-]+)\s*(?={)", body)
    if head is None:
        raise InputError(f"{body[:80]!r} is no call: call:name{{...}} is.")
    reader = _Reader(body, head.end(), quote)
    arguments = reader.value()
    reader.skip()
    if reader.place != len(body):
        raise reader.wrong("the end")
    return {"name": head[1], "arguments": arguments}


class _Reader:
    """Values as Gemma writes them: JSON with quotes of its own, and names without any."""

    def __init__(self, text: str, place: int, quote: str) -> None:
        self.text, self.place, self.quote, self.depth = text, place, quote, 0

    def wrong(self, expected: str) -> InputError:
        found = self.text[self.place : self.place + 20]
        return InputError(f"the call is malformed at character {self.place}: found {found!r}, expected {expected}.")

    def skip(self) -> None:
        while self.text[self.place : self.place + 1].isspace():
            self.place += 1

    def take(self, mark: str) -> bool:
        self.skip()
        if not self.text.startswith(mark, self.place):
            return False
        self.place += len(mark)
        return True

    def value(self) -> Any:
        if self.take("{"):
            return dict(self._items("}", self._pair))
        if self.take("["):
            return self._items("]", self.value)
        return self._quoted() if self.take(self.quote) else _bare(self._word(",]}"))

    def _pair(self) -> tuple[str, Any]:
        key = self._quoted() if self.take(self.quote) else self._word(":,]}")
        if not self.take(":"):
            raise self.wrong("':'")
        return key, self.value()

    def _items(self, end: str, item: Callable[[], Any]) -> list[Any]:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.wrong(f"at most {_MAX_DEPTH} levels")
        found: list[Any] = []
        while not self.take(end):
            if found and not self.take(","):
                raise self.wrong(f"',' or {end!r}")
            found.append(item())
        self.depth -= 1
        return found

    def _quoted(self) -> str:
        end = self.text.find(self.quote, self.place)
        if end < 0:
            raise self.wrong("the end of a string")
        found, self.place = self.text[self.place : end], end + len(self.quote)
        return found

    def _word(self, ends: str) -> str:
        begin = self.place
        while self.place < len(self.text) and self.text[self.place] not in ends:
            self.place += 1
        word = self.text[begin : self.place].strip()
        if not word:
            raise self.wrong("a value")
        return word


def _bare(word: str) -> Any:
    """A number, a truth value or nothing; any other word is text that was left without its quotes."""
    if re.fullmatch(r"-?(0|[1-9]\d{0,300})(\.\d+)?([eE][+-]?\d{1,3})?", word):
        number = json.loads(word)
        return number if math.isfinite(number) else word
    return {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}.get(word, word)
