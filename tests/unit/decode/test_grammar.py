"""Output that follows a JSON schema, a regular expression or a grammar."""

import json
import re
import sys

import pytest
import torch

from gemmakit.errors import GenerationConfigError, InputError, MissingDependency
from gemmakit.pytorch.decode.processors.grammar import grammar_constraint
from gemmakit.pytorch.decode.token_bytes import bytes_of, token_table

pytest.importorskip("llguidance")

EOS = [1, 107]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["x", "yé", "🙂"]}, "minItems": 1, "maxItems": 3},
        "pet": {"anyOf": [{"type": "null"}, {"const": "猫"}]},
    },
    "required": ["name", "age", "tags", "pet"],
    "additionalProperties": False,
}


def is_person(value):
    return (
        list(value) == ["name", "age", "tags", "pet"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and 0 <= value["age"] <= 130
        and 1 <= len(value["tags"]) <= 3
        and set(value["tags"]) <= {"x", "yé", "🙂"}
        and value["pet"] in (None, "猫")
    )


SCHEMAS = [
    (PERSON, is_person),
    ({"type": "boolean"}, lambda v: v in (True, False)),
    ({"enum": ["Ω", 3, None, [1, {"a": "ŋ"}]]}, lambda v: v in ["Ω", 3, None, [1, {"a": "ŋ"}]]),
    ({"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": -9}, "minItems": 2, "maxItems": 4},
     lambda v: 2 <= len(v) <= 4 and all(isinstance(x, int) and -9 <= x <= 9 for x in v)),
    ({"type": "string", "pattern": "^[a-z]{2,4}-\\d{2}$"}, lambda v: bool(re.fullmatch(r"[a-z]{2,4}-\d{2}", v))),
]  # fmt: skip


def answers(model, tokenizer, prompt=((2, 300, 301),), **settings):
    """The new text of each row, which must have ended by itself."""
    ids = torch.tensor(prompt)
    settings = {"max_new_tokens": 500, "eos_token_id": EOS, "pad_token_id": 0, **settings}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **settings)
    texts = []
    for row in out[:, ids.shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in EOS]
        assert ends, tokenizer.decode(row)
        assert set(row[ends[0] + 1 :]) <= {0}
        texts.append(tokenizer.decode(row[: ends[0]]))
    return texts


@pytest.mark.parametrize(("schema", "holds"), SCHEMAS, ids=lambda s: str(s)[:20])
def test_json_parses_and_validates(model, tokenizer, schema, holds):
    for sampling in ({}, {"do_sample": True, "seed": 1, "num_return_sequences": 4}, {"num_beams": 3}):
        for text in answers(model, tokenizer, json_schema=schema, **sampling):
            assert holds(json.loads(text)), text
    assert answers(model, tokenizer, json_schema=json.dumps(schema)) == answers(model, tokenizer, json_schema=schema)


def test_any_json(model, tokenizer):
    for text in answers(model, tokenizer, json_schema=True, do_sample=True, top_k=0, seed=3, num_return_sequences=3):
        json.loads(text)


EXPRESSIONS = [r"[ab]{2,5}é?🙂[0-9]x", r"(yes|no|może)", r"[0-9]{3}-[0-9]{4}", r"猫{1,3} (и|и нет)"]


@pytest.mark.parametrize("regex", EXPRESSIONS)
def test_regex_matches_all_of_the_new_text(model, tokenizer, regex):
    for settings in ({}, {"do_sample": True, "seed": 2, "num_return_sequences": 5, "top_k": 0}, {"num_beams": 2}):
        for text in answers(model, tokenizer, regex=regex, **settings):
            assert re.fullmatch(regex, text), text


def test_grammar(model, tokenizer):
    grammar = 'start: "sum" "(" item ("," item){0,3} ")"\nitem: NUMBER | start\nNUMBER: /[0-9]{1,2}/'
    depth = 'start: "f(" start ")" | "x"'
    for text in answers(model, tokenizer, grammar=grammar, do_sample=True, seed=5, num_return_sequences=3, top_k=3):
        assert re.fullmatch(r"[sum(),0-9]+", text)
        assert text.count("(") == text.count(")")
        eval(text.replace("sum(", "max(0,0,"), {"__builtins__": {"max": max}})
    (text,) = answers(model, tokenizer, grammar=depth, do_sample=True, seed=1, top_k=0)
    assert text == "f(" * text.count("f") + "x" + ")" * text.count("f")


def test_both_tokenizers_give_the_same(model, slow, fast):
    for settings in ({"json_schema": PERSON}, {"regex": EXPRESSIONS[0]}):
        assert answers(model, slow, **settings) == answers(model, fast, **settings)


def test_rows_have_their_own_state(model, fast):
    """Together or alone, a row ends up with the same text; rows end at different steps."""
    prompts = [(2, 310, 305), (2, 410, 401), (2, 510, 700), (2, 333, 444)]
    together = answers(model, fast, prompts, json_schema=PERSON)
    assert together == [answers(model, fast, (p,), json_schema=PERSON)[0] for p in prompts]
    assert len(set(together)) > 1


def test_drafts_that_are_refused_are_taken_back(model, fast):
    schema = {"type": "array", "items": {"enum": ["abc", "abd", "b"]}, "minItems": 6, "maxItems": 9}
    plain = answers(model, fast, json_schema=schema)
    assert plain == answers(model, fast, json_schema=schema, prompt_lookup_num_tokens=4)


def test_matcher_follows_any_change_of_rows(fast, model):
    """Beams change places and drafts are taken back: the state is what the ids say."""
    from gemmakit import GenerationConfig

    config = GenerationConfig(regex=r"(abc|abd|xyz)+!", eos_token_id=1)
    V = model.config.vocab_size
    used = grammar_constraint(config, fast, V, 1)
    table, _ = token_table(fast, V)
    letter = {c: next(i for i, b in enumerate(table) if b == c.encode()) for c in "abcdxyz!"}
    for pair in (("abcx", "xyzx"), ("xyzx", "abca"), ("abdab", "abdxy"), ("a", "x"), ("abc!", "abd!")):
        ids = torch.tensor([[2] + [letter[c] for c in text] for text in pair])
        fresh = grammar_constraint(config, fast, V, 1)
        scores = torch.zeros(2, V)
        assert torch.equal(used(ids, scores), fresh(ids, scores))
    assert used(ids, scores).isfinite().sum(-1).tolist() == [1, 1]  # eos alone


def test_the_end_is_any_eos_and_only_when_complete(model, fast):
    constraint = grammar_constraint(_config(regex="ab", eos_token_id=EOS), fast, model.config.vocab_size, 1)
    table, _ = token_table(fast, model.config.vocab_size)
    a, b = (next(i for i, w in enumerate(table) if w == c) for c in (b"a", b"b"))
    scores = torch.zeros(1, model.config.vocab_size)
    allowed = [constraint(torch.tensor([[2, *new]]), scores)[0].isfinite() for new in ([], [a], [a, b])]
    assert [bool(m[EOS].any()) for m in allowed] == [False, False, True]
    assert allowed[2].nonzero().flatten().tolist() == EOS
    assert {table[i] for i in allowed[0].nonzero().flatten().tolist()} <= {b"a", b"ab"}


def test_where_it_may_go_on_or_end_any_eos_ends_it(model, fast):
    constraint = grammar_constraint(_config(regex="ab*", eos_token_id=EOS), fast, model.config.vocab_size, 1)
    table, _ = token_table(fast, model.config.vocab_size)
    a = table.index(b"a")
    allowed = constraint(torch.tensor([[2, a]]), torch.zeros(1, model.config.vocab_size))[0].isfinite()
    assert {table[i] for i in allowed.nonzero().flatten().tolist() if i not in EOS} >= {b"b"}
    assert allowed[EOS].all()


def _config(**settings):
    from gemmakit import GenerationConfig

    return GenerationConfig(**settings)


def test_special_tokens_and_ids_beyond_the_tokenizer_never_come(model, fast):
    constraint = grammar_constraint(_config(regex="(?s:.*)", eos_token_id=1), fast, model.config.vocab_size, 1)
    V = model.config.vocab_size
    allowed = constraint(torch.tensor([[2]]), torch.zeros(1, V))[0].isfinite()
    assert not allowed[[0, 2, 3, 106, 107]].any()
    assert not allowed[len(fast.get_vocab()) :].any()
    assert allowed[1]
    assert allowed.sum() > 700


def test_names_become_bytes():
    assert [bytes_of(n) for n in ("<0x0A>", "▁▁x", "<0xG1>", "é")] == [b"\n", b"  x", b"<0xG1>", "é".encode()]


def test_table_follows_added_tokens(vocabulary_file):
    from gemmakit import GemmaTokenizerFast

    tokenizer = GemmaTokenizerFast(vocabulary_file)
    before, _ = token_table(tokenizer, 2000)
    tokenizer.add_tokens(["<tool>"])
    after, special = token_table(tokenizer, 2000)
    index = tokenizer.convert_tokens_to_ids("<tool>")
    assert before[index] == b""
    assert after[index] == b"<tool>"
    assert index not in special


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"regex": "[a"}, "unclosed character class"),
        ({"grammar": "start: nope"}, "nope"),
        ({"json_schema": {"type": "nope"}}, "nope"),
        ({"json_schema": "{"}, "no JSON"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(model, fast, settings, said):
    with pytest.raises(GenerationConfigError, match=said) as e:
        answers(model, fast, **settings)
    assert next(iter(settings)) in str(e.value)
    assert "\n" not in str(e.value)


def test_what_is_missing_is_named(model, fast, monkeypatch):
    ids = torch.tensor([[2, 300]])
    with pytest.raises(InputError, match="tokenizer="):
        model.generate(ids, regex="a", eos_token_id=1)
    with pytest.raises(InputError, match="eos_token_id"):
        model.generate(ids, regex="a", tokenizer=fast, eos_token_id=-1)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependency, match=r"pip install 'gemmakit\[constrained\]'"):
        model.generate(ids, regex="a", tokenizer=fast, eos_token_id=1)


def test_a_token_forced_against_the_grammar_is_an_error(model, fast):
    def stubborn(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([500]), 0.0)

    with pytest.raises(InputError, match="leaves the grammar"):
        answers(model, fast, regex="ab", logits_processor=[stubborn])
