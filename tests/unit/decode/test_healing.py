"""Token healing: the last prompt token is grown again from its own bytes."""

import pytest
import torch

from gemmakit.errors import InputError
from gemmakit.pytorch.decode.token_bytes import token_table

NEW = dict(max_new_tokens=1, eos_token_id=None, pad_token_id=0)


def healed(model, tokenizer, rows, width=None):
    width = width or max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    out = model.generate(ids, attention_mask=mask, token_healing=True, tokenizer=tokenizer, **NEW)
    return [row[width - len(r) : width].tolist() for row, r in zip(out, rows, strict=True)]


def expected(model, tokenizer, row):
    """By the definition, a token at a time."""
    table, special = token_table(tokenizer, model.config.vocab_size)
    tail = row[-1]
    if tail in special or len(row) == 1:
        return row
    scores = model(torch.tensor([row[:-1]])).logits[0, -1].detach().float()
    scores[tail] += 1.0
    longer = [
        i for i, w in enumerate(table) if i not in special and w.startswith(table[tail]) and len(w) > len(table[tail])
    ]
    best = max([tail, *longer], key=lambda i: float(scores[i]))
    return [*row[:-1], best]


PROMPTS = [
    "the arg",
    "return a",
    "def ",
    "self.",
    "x = (",
    "naï",
    "  ",
    "class A:\n",
    "\n\n",
    "pars",
    "opt",
    "ca",
    "i",
    "杰",
]


@pytest.mark.parametrize("text", PROMPTS)
def test_the_last_token_is_the_likeliest_that_begins_alike(model, tokenizer, text):
    row = tokenizer.encode(text)
    (out,) = healed(model, tokenizer, [row])
    assert out == expected(model, tokenizer, row)
    assert tokenizer.decode(out, skip_special_tokens=True).startswith(text)


def test_some_prompts_do_change(model, fast):
    rows = [fast.encode(text) for text in PROMPTS]
    assert any(healed(model, fast, [r])[0] != r for r in rows)


def test_rows_of_a_batch_heal_as_alone(model, tokenizer):
    rows = [tokenizer.encode(text) for text in PROMPTS]
    assert healed(model, tokenizer, rows) == [healed(model, tokenizer, [r])[0] for r in rows]
    assert healed(model, tokenizer, rows, width=20) == healed(model, tokenizer, rows)


@pytest.mark.filterwarnings("ignore:a prompt does not begin")
def test_special_tails_and_lone_tokens_stay(model, tokenizer):
    a = tokenizer.encode("a", add_special_tokens=False)
    rows = [[2], a, [2, *a, 107], [2, 106]]
    assert healed(model, tokenizer, rows) == rows


def test_what_follows_is_as_if_the_healed_prompt_were_given(model, fast):
    row = fast.encode("the arg")
    ask = dict(max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    out = model.generate(torch.tensor([row]), token_healing=True, tokenizer=fast, **ask)
    again = model.generate(torch.tensor([expected(model, fast, row)]), **ask)
    assert out.tolist() == again.tolist()
    static = model.generate(
        torch.tensor([row]), token_healing=True, tokenizer=fast, cache_implementation="static", **ask
    )
    assert static.tolist() == again.tolist()


def test_what_is_missing_is_named(model, fast):
    ids = torch.tensor([[2, 300, 301]])
    with pytest.raises(InputError, match="tokenizer="):
        model.generate(ids, token_healing=True, **NEW)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(InputError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, token_healing=True, tokenizer=fast, **NEW)
    cache = model(ids).past_key_values
    with pytest.raises(InputError, match="past_key_values"):
        model.generate(ids, past_key_values=cache, token_healing=True, tokenizer=fast, **NEW)


def test_a_cache_of_the_beginning_may_be_given(model, fast):
    row = torch.tensor([fast.encode("the arg")])
    ask = dict(max_new_tokens=5, eos_token_id=None, token_healing=True, tokenizer=fast)
    cache = model(row[:, :2], use_cache=True).past_key_values
    assert model.generate(row, past_key_values=cache, **ask).tolist() == model.generate(row, **ask).tolist()
