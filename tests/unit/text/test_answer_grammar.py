"""The grammar of an answer allows what the schemas allow, in the tokens that the parser reads back."""

from __future__ import annotations

from typing import Any

import pytest
from gemma4_form import equip, ids_of_call, plain_ids
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance", reason="grammars take gemmakit[constrained]")

from gemmakit import GenerationConfig
from gemmakit.pytorch.decode.processors.grammar import grammar_constraint
from gemmakit.text import GemmaTokenizerFast
from gemmakit.text.answer_grammar import answer_grammar

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": ["integer", "null"]},
        "odd key": {"enum": ["<|tool_call>", 3, True]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/pair"}, "minItems": 1, "maxItems": 2},
        "any": {},
    },
    "required": ["text"],
    "$defs": {"pair": {"type": "object", "properties": {"x": {"type": "number"}, "next": {"$ref": "#/$defs/pair"}}}},
}
TOOLS = [{"function": {"name": "f", "parameters": PARAMETERS}}, {"function": {"name": "g.h-1"}}]

texts = st.text(st.sampled_from([*"a{}:,\"'\n é🙂<|>"]), max_size=6) | st.just("<|tool_call>")
scalars = st.one_of(texts, st.integers(-999, 999), st.booleans(), st.none())
pairs = st.recursive(
    st.fixed_dictionaries({}, optional={"x": st.sampled_from([0, -1.5, 2e10])}),
    lambda pair: st.fixed_dictionaries({"next": pair}, optional={"x": st.just(1)}),
    max_leaves=3,
)
arguments = st.fixed_dictionaries(
    {"text": texts},
    optional={
        "count": st.integers(-999, 999) | st.none(),
        '<|"|>odd key<|"|>': st.sampled_from(["<|tool_call>", 3, True]),
        "list": st.lists(pairs, min_size=1, max_size=2),
        "any": st.lists(scalars, max_size=2) | st.dictionaries(st.sampled_from("ab"), scalars) | scalars,
    },
)


@pytest.fixture(scope="module")
def tokenizer(model_path: Any) -> Any:
    return equip(GemmaTokenizerFast(model_path))


def allowed(tokenizer: Any, grammar: str, ids: list[int]) -> bool:
    """Whether an answer may begin with these ids, or be them."""
    config = GenerationConfig(grammar=grammar, eos_token_id=1)
    constraint = grammar_constraint(config, tokenizer, len(tokenizer), 0)
    assert constraint is not None
    return constraint.start.deep_copy().validate_tokens(ids) == len(ids)


def in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: in_order(item) for key, item in sorted(value.items(), key=lambda pair: pair[0].strip('<|">'))}
    return [in_order(item) for item in value] if isinstance(value, list) else value


def call_ids(tokenizer: Any, name: str, given: dict[str, Any]) -> list[int]:
    """As the model writes a call; a name that needs quotes is given with them."""
    ids = ids_of_call(tokenizer, name, in_order(given))
    quote = tokenizer.convert_tokens_to_ids('<|"|>')
    spelled = plain_ids(tokenizer, '<|"|>odd key<|"|>:')
    for place in range(len(ids)):
        if ids[place : place + len(spelled)] == spelled:
            return [*ids[:place], quote, *plain_ids(tokenizer, "odd key"), quote, *plain_ids(tokenizer, ":"),
                    *ids[place + len(spelled) :]]  # fmt: skip
    return ids


@settings(max_examples=40, deadline=None)
@given(arguments)
def test_every_call_that_its_schema_allows_is_allowed(tokenizer: Any, given: Any) -> None:
    ids = call_ids(tokenizer, "f", given)
    grammar = answer_grammar(tokenizer, TOOLS)
    assert allowed(tokenizer, grammar, [*ids, *ids_of_call(tokenizer, "g.h-1", {})])
    (call,) = tokenizer.parse_response(ids)["tool_calls"]
    assert call["function"]["arguments"] == {key.strip('<|">'): value for key, value in given.items()}


WRONG: list[dict[str, Any]] = [{"text": 1}, {"text": "a", "count": 1.5}, {"text": "a", "more": 1}]
WRONG += [{}, {"text": "a", "list": []}, {"text": "a", "list": [{"x": "y"}]}]


@pytest.mark.parametrize("given", WRONG)
def test_other_calls_are_not(tokenizer: Any, given: Any) -> None:
    assert not allowed(tokenizer, answer_grammar(tokenizer, TOOLS), call_ids(tokenizer, "f", given))


def holding(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


@pytest.mark.parametrize("choices", [["#", "#"], ["#/$defs/a"], ["#/$defs/b", "#/$defs/a"]])
def test_a_choice_that_leads_back_to_itself_is_the_others(tokenizer: Any, choices: list[str]) -> None:
    a = {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "string"}]}
    b = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}
    wanted = {"anyOf": [{"$ref": reference} for reference in choices]}
    parameters = {**holding(x=wanted), "$defs": {"a": a, "b": b}}
    grammar = answer_grammar(tokenizer, [{"function": {"name": "f", "parameters": parameters}}])
    own = choices[0] == "#"  # the arguments are then such a value themselves, which has no end
    assert allowed(tokenizer, grammar, ids_of_call(tokenizer, "f", {"x": "a"})) is not own
    assert not allowed(tokenizer, grammar, ids_of_call(tokenizer, "f", {"x": 1}))


def test_a_choice_of_nothing_but_itself_is_any_value(tokenizer: Any) -> None:
    parameters = {**holding(x={"$ref": "#/$defs/a"}), "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}
    grammar = answer_grammar(tokenizer, [{"function": {"name": "f", "parameters": parameters}}])
    assert all(allowed(tokenizer, grammar, ids_of_call(tokenizer, "f", {"x": value})) for value in ("a", 1))


def test_what_else_an_answer_may_be(tokenizer: Any) -> None:
    call = ids_of_call(tokenizer, "g.h-1", {})
    text, json = plain_ids(tokenizer, "Hello"), plain_ids(tokenizer, '{"a": 1}')
    opened, closed = tokenizer.convert_tokens_to_ids(["<|channel>", "<channel|>"])
    thought = [opened, *plain_ids(tokenizer, "thought\nHm.\n"), closed]
    schema = {"type": "object", "required": ["a"]}

    def may(*parts: list[int], **how: Any) -> bool:
        return allowed(tokenizer, answer_grammar(tokenizer, TOOLS, **how), [token for part in parts for token in part])

    assert may(call, call) and not may(text) and not may(thought, call) and not may(call, call, parallel=False)
    assert may(thought, call, thought=True) and may(call, thought=True) and not may(thought, text, thought=True)
    assert may(thought[5:], call, thinking=True) and not may(call, thinking=True)
    free: dict[str, Any] = {"must_call": False}
    assert may(text, call, text, **free) and not may(thought, text, **free) and may(thought, text, **free, thought=True)
    shaped = {**free, "schema": schema}
    assert may(json, **shaped) and may(call, **shaped) and not may(text, **shaped) and not may(json, call, **shaped)
    assert may(thought, json, **shaped, thought=True)
