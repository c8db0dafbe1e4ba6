"""outlines holds a gemmakit model to choices, expressions and schemas."""

import json
import re
from typing import Literal

import outlines
import pytest
from outlines.types import Regex
from pydantic import BaseModel

pytestmark = pytest.mark.usefixtures("registered")


class Sum(BaseModel):
    a: int
    ok: bool


def test_answers_are_of_the_form_that_was_asked_for(model, tokenizer):
    asked = outlines.from_transformers(model, tokenizer)
    assert asked("Is it there?", Literal["yes", "no"], max_new_tokens=8) in ("yes", "no")
    assert re.fullmatch(r"[0-9]{2}-[a-f]", asked("Say it", Regex(r"[0-9]{2}-[a-f]"), max_new_tokens=20))
    answers = asked.batch(["Is it?", "And the other one there?"], Literal["yes", "no"], max_new_tokens=8)
    assert {*answers} <= {"yes", "no"}


def test_a_schema_is_kept_as_far_as_the_tokens_reach(model, tokenizer):
    text = outlines.from_transformers(model, tokenizer)("A sum", Sum, max_new_tokens=60)
    try:
        assert Sum(**json.loads(text))
    except json.JSONDecodeError:
        assert text.lstrip().startswith("{")
