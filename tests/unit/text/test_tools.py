"""Functions become the schemas that transformers makes of them; calls come back as they were written."""

from __future__ import annotations

import enum
import json
import re
from typing import Any, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmakit.errors import InputError
from gemmakit.text.response import FUNCTION_GEMMA, ResponseParser, parse_tool_calls
from gemmakit.text.tools import tool_schema

CALL, CALL_END, QUOTE = FUNCTION_GEMMA.call, FUNCTION_GEMMA.call_end, FUNCTION_GEMMA.quote


class Unit(enum.Enum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


def weather(location: str, unit: str = "celsius") -> float:
    """
    Gets the current weather in a given location.

    Args:
        location: The city and state, e.g. "San Francisco, CA" or "Tokyo, JP"
        unit: The unit to return the temperature in. (choices: ["celsius", "fahrenheit"])

    Returns:
        The temperature.
    """
    return 22.0


def types_of_all_kinds(
    whole: int,
    part: float,
    flag: bool,
    anything: Any,
    bare: list,  # pyright: ignore[reportMissingTypeArgument]
    many: list[int],
    pair: tuple[int, str],
    table: dict[str, float],
    nested: list[dict[str, list[int]]],
    maybe: Optional[str] = None,  # noqa: UP045 (both spellings are to be read)
    either: int | str = 3,
    other: int | list[str] | None = None,
    one: Literal["a", "b"] = "a",
    mixed: Literal[1, "x", None] = 1,
    unit: Unit = Unit.CELSIUS,
) -> None:
    """Does nothing: in two lines
    of description.

    And a paragraph.

    Args:
        whole: A number
            that is described in two lines: here is the second.
        part: Another.
        flag: Yes or no.

        anything: What you like.
        bare: Items.
        many: Numbers.
        pair: Two.
        table: By name.
        nested: Deep.
        maybe: A text, or nothing.
        either: One of two.
        other: One of three.
        one: A letter.
        mixed: Of several types.
        unit: Of temperature.

    Raises:
        ValueError: never.
    """


def nothing() -> str:
    """Takes nothing."""
    return ""


class Clock:
    def now(self, zone: str):
        """The time.

        Args:
            zone: Where.
        """


@pytest.mark.parametrize("function", [weather, types_of_all_kinds, nothing, Clock.now, Clock().now])
def test_a_schema_is_that_of_transformers(function: Any) -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    assert tool_schema(function) == chat_template_utils.get_json_schema(function)


def test_a_schema_is_left_as_it_is() -> None:
    schema = {"type": "function", "function": {"name": "f"}}
    assert tool_schema(schema) is schema


def no_docstring(x: int) -> None: ...


def no_type(x):  # pyright: ignore[reportMissingParameterType]
    """Takes something.

    Args:
        x: Something.
    """


def no_description(x: int):
    """Takes a number."""


def foreign_type(x: re.Pattern[str]):
    """Takes a pattern.

    Args:
        x: A pattern.
    """


def bad_choices(x: str):
    """Takes a word.

    Args:
        x: A word (choices: [a, b])
    """


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (no_docstring, "no_docstring has no docstring.*JSON schema"),
        (no_type, "argument x has no type.*JSON schema"),
        (no_description, "argument x has no description"),
        (foreign_type, "x has the type .*re.Pattern"),
        (bad_choices, "not a JSON list"),
        ("weather", "must be a function or a JSON schema"),
    ],
)
def test_what_a_schema_cannot_say_is_refused(tool: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tool_schema(tool)


DECLARED = (
    "<start_function_declaration>declaration:weather{description:<escape>Gets the current weather in a given location."
    "<escape>,parameters:{properties:{location:{description:<escape>The city and state, e.g. "
    '"San Francisco, CA" or "Tokyo, JP"<escape>,type:<escape>STRING<escape>},unit:{description:<escape>The unit to '
    "return the temperature in.<escape>,enum:[<escape>celsius<escape>,<escape>fahrenheit<escape>],type:<escape>STRING"
    "<escape>}},required:[<escape>location<escape>],type:<escape>OBJECT<escape>}}<end_function_declaration>"
)
# Declares functions as https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices shows it.
DECLARING = (
    "{% macro texts(values) %}[{% for v in values %}{{ ',' if not loop.first }}<escape>{{ v }}<escape>{% endfor %}]"
    "{% endmacro %}{{ bos_token }}<start_of_turn>developer\n{{ messages[0].content }}{% for tool in tools %}"
    "{% set f = tool.function %}<start_function_declaration>declaration:{{ f.name }}{description:<escape>"
    "{{ f.description }}<escape>,parameters:{properties:{{ '{' }}"
    "{% for name, p in f.parameters.properties | dictsort %}"
    "{{ ',' if not loop.first }}{{ name }}:{description:<escape>{{ p.description }}<escape>"
    "{% if p.enum %},enum:{{ texts(p.enum) }}{% endif %},type:<escape>{{ p.type | upper }}<escape>}{% endfor %}}"
    ",required:{{ texts(f.parameters.required) }},type:<escape>{{ f.parameters.type | upper }}<escape>}}"
    "<end_function_declaration>{% endfor %}<end_of_turn>"
)


def test_a_template_declares_a_function_as_documented(both: Any) -> None:
    chat = [{"role": "developer", "content": "Call."}]
    text = both.apply_chat_template(chat, tools=[weather], chat_template=DECLARING, tokenize=False)
    assert text == f"<bos><start_of_turn>developer\nCall.{DECLARED}<end_of_turn>"
    ids = both.apply_chat_template(chat, tools=[weather], chat_template=DECLARING).input_ids
    assert both.decode(ids) == text


def test_a_template_without_tools_says_that_it_has_none(either: Any) -> None:
    with pytest.warns(UserWarning, match="says nothing of tools"):
        either.apply_chat_template([{"role": "user", "content": "x"}], tools=[weather])


# -- calls


def written(value: Any, quoted_keys: bool = False) -> str:
    """A value as FunctionGemma writes it."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        keys = {key: written(key) if quoted_keys else key for key in value}
        return "{" + ",".join(f"{keys[key]}:{written(item, quoted_keys)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(item, quoted_keys) for item in value) + "]"
    return json.dumps(value)


def call(name: str, arguments: dict[str, Any], quoted_keys: bool = False) -> str:
    return f"{CALL}call:{name}{written(arguments, quoted_keys)}{CALL_END}"


texts = st.lists(st.sampled_from([*"{}[]:,\"'\n é", "a", "12", "true", CALL, CALL_END, "<esc"])).map("".join)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
scalars = st.one_of(texts, st.integers(), st.floats(-1e9, 1e9), st.booleans(), st.none())
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=3), max_leaves=8)
calls = st.tuples(names, st.dictionaries(names, values, max_size=4))
plain = texts.filter(lambda text: CALL not in text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(plain, calls), max_size=3), plain, st.booleans(), st.data())
def test_calls_come_back_as_they_were_written(found: Any, rest: str, quoted_keys: bool, data: Any) -> None:
    text = "".join(before + call(name, arguments, quoted_keys) for before, (name, arguments) in found) + rest
    expected = [{"name": name, "arguments": arguments} for _, (name, arguments) in found]
    if CALL not in rest:
        assert parse_tool_calls(text) == expected
    parser, parts, left = ResponseParser(form=FUNCTION_GEMMA), [], text
    while left:
        size = data.draw(st.integers(1, 30))
        parts += parser.push(left[:size])
        left = left[size:]
    parts += parser.finish()
    assert [part for part in parts if isinstance(part, dict)] == expected
    assert "".join(part for part in parts if isinstance(part, str)) == "".join(before for before, _ in found) + rest


def test_the_documented_call() -> None:
    text = "<start_function_call>call:get_current_weather{location:<escape>Tokyo, Japan<escape>}<end_function_call>"
    assert parse_tool_calls(text) == [{"name": "get_current_weather", "arguments": {"location": "Tokyo, Japan"}}]


def test_a_word_without_quotes_is_text() -> None:
    text = f"{CALL}call:f{{a: Tokyo Tower , b:007,c:-1.5e3,d:None,e:0}}{CALL_END}"
    expected = {"a": "Tokyo Tower", "b": "007", "c": -1500.0, "d": None, "e": 0}
    assert parse_tool_calls(text)[0]["arguments"] == expected


@pytest.mark.parametrize(
    "text",
    [
        f"{CALL}call:f{{a:1}}",
        f"{CALL}f{{a:1}}{CALL_END}",
        f"{CALL}call:f(a=1){CALL_END}",
        f"{CALL}call:f{{a}}{CALL_END}",
        f"{CALL}call:f{{a:}}{CALL_END}",
        f"{CALL}call:f{{a:1,}}{CALL_END}",
        f"{CALL}call:f{{a:[1}}{CALL_END}",
        f"{CALL}call:f{{a:{QUOTE}b}}{CALL_END}",
        f"{CALL}call:f{{a:1}} more{CALL_END}",
        f"{CALL}call:f{{a:{'[' * 5000}{']' * 5000}}}{CALL_END}",
        f"{CALL}{CALL_END}",
    ],
)
def test_a_malformed_call_is_refused_and_its_text_kept(text: str) -> None:
    with pytest.raises(InputError, match="call"):
        parse_tool_calls(text)
    parser = ResponseParser(form=FUNCTION_GEMMA)
    assert "".join(map(str, parser.push("a" + text) + parser.finish())) == "a" + text


def test_text_comes_at_once_until_a_call_may_begin() -> None:
    parser = ResponseParser(form=FUNCTION_GEMMA)
    assert parser.push("Let me see. <start") == ["Let me see. "]
    assert parser.push(" here") == ["<start here"]
    assert parser.push(call("f", {"x": "y"}) + "done") == [{"name": "f", "arguments": {"x": "y"}}, "done"]
    assert parser.finish() == []
