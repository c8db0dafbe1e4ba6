"""A grammar of what an answer may be: thoughts, calls as schemas allow in the notation that Gemma writes, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, cast

from gemmakit.generation.constraints import JSON_BLANK
from gemmakit.text.response import ResponseForm

Schema = Mapping[str, Any]

# Names of arguments that stand without quotes; the notation ends others at the first of its own signs.
_BARE = re.compile(r"[^\s\x00-\x1f\x7f:,{}\[\]<>\"']{1,64}")
_WHOLE = r"-?(0|[1-9][0-9]{0,15})"
_NUMBER = rf"{_WHOLE}(\.[0-9]{{1,15}})?([eE][+-]?[0-9]{{1,2}})?"
_NOTHING: Schema = {"type": "object", "properties": {}}
_ANYTHING: Schema = {}
_DEPTH = 32  # of schemas inside one another; what is deeper may be any value


def answer_grammar(
    tokenizer: Any,
    tools: Sequence[Schema] = (),
    *,
    must_call: bool = True,
    parallel: bool = True,
    schema: Schema | None = None,
    thought: bool = False,
    thinking: bool = False,
) -> str:
    """What an answer may be, as a Lark grammar for generate(grammar=...): a thought first, then calls of these tools.

    Arguments come in the order of the alphabet, as templates write them, those that a schema requires always. What a
    schema says of types, enum, const, properties, items, anyOf and its kin is followed, other limits are not.

    tools: JSON schemas, as `tools.tool_schema` gives them. must_call: whether one of them must be called; else the
    answer may be text with calls in it or, with a `schema`, one JSON value instead of calls. parallel: whether several
    calls may be made. thought: whether a thought may come first. thinking: whether the prompt has begun one.
    """
    return _Grammar(tokenizer).of(tools, must_call, parallel, schema, thought, thinking)


class _Grammar:
    def __init__(self, tokenizer: Any) -> None:
        self.form: ResponseForm = tokenizer.response_form
        known = {name: tokenizer.added_token(name) for name in self.form.names}
        self._ids: dict[str, int] = {name: added[0] for name, added in known.items() if added is not None}
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # of rules that are there, by what they say
        self._count = count()
        self._schemas: dict[int, str] = {}  # and by which part of a schema: one that holds itself is a rule that does

    def of(
        self,
        tools: Sequence[Schema],
        must_call: bool,
        parallel: bool,
        schema: Schema | None,
        thought: bool,
        thinking: bool,
    ) -> str:
        form = self.form
        thinks = bool(form.thought and form.thought_end)
        if thinks:
            end = f"TEXT? {self._mark(form.thought_end or '')}"
            self._rules["thought"] = f"{self._mark(form.thought or '')} {_quoted(form.label)} {end}"
            self._rules["rest"] = end
        if tools:
            calls = " | ".join(self._call(cast(Schema, tool["function"])) for tool in tools)
            self._rules["call"] = f"{self._mark(form.call)} ({calls}) {self._mark(form.call_end)}"
        if schema is not None:
            blank = {"x-guidance": {"whitespace_pattern": JSON_BLANK}}
            self._rules["json"] = f"%json {json.dumps({**schema, **blank})}"
        several = "call+" if parallel else "call"
        if must_call:
            answer = several
        elif schema is not None:
            answer = f"({several} | json)" if tools else "json"
        else:
            inside = " | ".join([*(["call"] if tools else []), *(["thought"] if thinks and thought else [])])
            answer = f"TEXT? (({inside}) TEXT?)*" if inside else "TEXT?"
        first = "rest " if thinks and thinking else "thought? " if thinks and thought else ""
        # Of a token that is letters to the vocabulary the first character tells.
        anything = r"/(.|\n)+/" if len(self._ids) == len(form.names) else r"/[^<]+/"
        rules = (f"{name}: {rule}" for name, rule in self._rules.items())
        return "\n".join([f"start: {first}{answer}", *rules, f"TEXT: {anything}"]) + "\n"

    def _mark(self, name: str) -> str:
        """A token: by its id, so that no letters can stand for it."""
        return f"<[{self._ids[name]}]>" if name in self._ids else _quoted(name)

    def _rule(self, what: str) -> str:
        if what not in self._names:
            self._names[what] = f"r{len(self._names)}"
            self._rules[self._names[what]] = what
        return self._names[what]

    def _call(self, function: Schema) -> str:
        parameters: Schema = function.get("parameters") or _NOTHING
        self._schemas.clear()
        body = self._object(parameters, parameters, 0)
        return f"{_quoted('call:' + function['name'])} {body}"

    def _value(self, schema: Any, root: Schema, depth: int) -> str:
        """A rule, or what may stand in place of one."""
        if not isinstance(schema, Mapping) or depth > _DEPTH:
            return self._anything()
        schema = _followed(cast(Schema, schema), root)
        if id(schema) not in self._schemas:
            name = self._schemas[id(schema)] = f"s{next(self._count)}"
            self._rules[name] = self._meant(schema, root, depth)
        return self._schemas[id(schema)]

    def _meant(self, schema: Schema, root: Schema, depth: int) -> str:
        if "const" in schema:
            return self._literal(schema["const"])
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return self._either(map(self._literal, schema["enum"]))
        if _listed(schema):
            choices = [self._value(one, root, depth + 1) for one in _choices(schema, root, set())]
            return self._either(choices) if choices else self._anything()
        kinds = schema.get("type")
        listed: list[Any] = list(kinds) if isinstance(kinds, list) else [kinds]
        if schema.get("nullable") is True and "null" not in listed:
            listed.append("null")
        return self._either(self._kind(kind, schema, root, depth) for kind in listed)

    def _kind(self, kind: Any, schema: Schema, root: Schema, depth: int) -> str:
        match str(kind).lower():
            case "string":
                return self._string()
            case "integer":
                return f"/{_WHOLE}/"
            case "number":
                return f"/{_NUMBER}/"
            case "boolean":
                return '("true" | "false")'
            case "null":
                return '"null"'
            case "array":
                return self._array(schema, root, depth)
            case "object":
                return self._object(schema, root, depth)
            case _:
                return self._object(schema, root, depth) if "properties" in schema else self._anything()

    def _string(self) -> str:
        quote = self._mark(self.form.quote)
        return self._rule(f"{quote} TEXT? {quote}")

    def _anything(self) -> str:
        if "value" not in self._rules:
            self._rules["value"] = ""  # it holds itself
            self._rules["pair"] = f"/{_BARE.pattern}/ {_quoted(':')} value"
            plain = f'{self._string()} | /{_NUMBER}/ | "true" | "false" | "null"'
            self._rules["value"] = f'{plain} | "[" (value ("," value)*)? "]" | "{{" (pair ("," pair)*)? "}}"'
        return "value"

    def _either(self, rules: Iterator[str] | Any) -> str:
        found = list(dict.fromkeys(rules))
        return found[0] if len(found) == 1 else self._rule(" | ".join(found))

    def _literal(self, value: Any) -> str:
        """A value that must be this one."""
        if isinstance(value, str):
            quote = self._mark(self.form.quote)
            return self._rule(" ".join([quote, *([_quoted(value)] if value else []), quote]))
        if isinstance(value, Mapping):
            items = [f"{self._key(key)} {self._literal(item)}" for key, item in sorted(cast(Schema, value).items())]
            return self._rule(" ".join(['"{"', ' "," '.join(items), '"}"']))
        if isinstance(value, list):
            items = [self._literal(item) for item in cast("list[Any]", value)]
            return self._rule(" ".join(['"["', ' "," '.join(items), '"]"']))
        return _quoted(json.dumps(value))

    def _key(self, name: str) -> str:
        if _BARE.fullmatch(name):
            return _quoted(f"{name}:")
        return f"{self._literal(name)} {_quoted(':')}"

    def _array(self, schema: Schema, root: Schema, depth: int) -> str:
        item = self._value(schema.get("items"), root, depth + 1)
        least, most = (schema.get(name) for name in ("minItems", "maxItems"))
        least = least if isinstance(least, int) and 0 <= least <= 1000 else 0
        most = most if isinstance(most, int) and least <= most <= 1000 else None
        if most == 0:
            return _quoted("[]")
        more = f'("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}'
        items = f"{item} {more}" if least else f"({item} {more})?"
        return self._rule(f'"[" {items} "]"')

    def _object(self, schema: Schema, root: Schema, depth: int) -> str:
        schema = _followed(schema, root)
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            if schema.get("additionalProperties") is False or "properties" in schema:
                return _quoted("{}")
            self._anything()
            return self._rule('"{" (pair ("," pair)*)? "}"')
        listed = schema.get("required")
        required: list[Any] = list(listed) if isinstance(listed, list) else []
        first, later = '"}"', '"}"'  # what may come when nothing, and when something, is written already
        for name, inner in sorted(cast(Schema, properties).items(), reverse=True):
            item = f"{self._key(name)} {self._value(inner, root, depth + 1)}"
            begins, goes_on = f"{item} {later}", f'"," {item} {later}'
            optional = name not in required
            first, later = (
                self._rule(f"{begins} | {first}" if optional else begins),
                self._rule(f"{goes_on} | {later}" if optional else goes_on),
            )
        return self._rule(f'"{{" {first}')


def _followed(schema: Schema, root: Schema) -> Schema:
    """What a reference into the same schema means; one that leads nowhere means anything."""
    for _ in range(_DEPTH):
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            break
        found: Any = root
        for name in reference.removeprefix("#").strip("/").split("/"):
            found = cast(Schema, found).get(name) if isinstance(found, Mapping) and name else found
        schema = cast(Schema, found) if isinstance(found, Mapping) else _ANYTHING
    return schema


def _listed(schema: Schema) -> Sequence[Any]:
    """The schemas of which a value may follow any."""
    if "const" in schema or (isinstance(schema.get("enum"), list) and schema["enum"]):
        return ()
    lists = (schema.get(name) for name in ("anyOf", "oneOf"))
    return next((each for each in lists if isinstance(each, list) and each), ())


def _choices(schema: Any, root: Schema, seen: set[int]) -> Iterator[Any]:
    """The same to the last level, each once: a choice that leads back to itself would be a rule that has no end."""
    if isinstance(schema, Mapping):
        schema = _followed(cast(Schema, schema), root)
        if id(schema) in seen:
            return
        seen.add(id(schema))
        if listed := _listed(schema):
            for one in listed:
                yield from _choices(one, root, seen)
            return
    yield schema


def _quoted(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)
