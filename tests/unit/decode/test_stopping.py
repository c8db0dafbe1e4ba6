"""What ends a row: texts across token borders, time, lists, eos."""

import time

import pytest
import torch

import gemmakit
from gemmakit import GenerationConfig
from gemmakit.errors import InputError
from gemmakit.pytorch.decode import stopping
from gemmakit.pytorch.decode.token_bytes import token_table


def criterion(tokenizer, *texts):
    (found,) = stopping.build(GenerationConfig(stop_strings=list(texts)), tokenizer, ())
    return found


def stops_at(tokenizer, text_or_ids, *texts, prompt=0):
    """How many of the tokens there are when the criterion first says so, or None."""
    ids = text_or_ids
    if isinstance(ids, str):
        ids = tokenizer.encode(ids, add_special_tokens=False)
    found = criterion(tokenizer, *texts)
    for n in range(prompt + 1, len(ids) + 1):
        if found(torch.tensor([ids[:n]]), torch.zeros(1, 1)).item():
            return n
    return None


def spelled(tokenizer, text):
    """The text a byte token at a time."""
    return [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in text.encode()]


CORPUS = "def add(a, b):\n    return a + b\n\n\nclass A: pass  # naïve façade 杰玛 🙂 done. END"
TEXTS = ["\n", "\n\n", "return", " a + b", "dd(a", "杰", "🙂", "ïve fa", " ", "END", "class A: pa", "):\n    r"]


@pytest.mark.parametrize("text", TEXTS)
def test_stops_at_the_token_that_completes_the_text(tokenizer, text):
    ids = tokenizer.encode(CORPUS, add_special_tokens=False)
    expected = next(n for n in range(1, len(ids) + 1) if text in tokenizer.decode(ids[:n]))
    assert stops_at(tokenizer, ids, text) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_pieces_count_like_characters(tokenizer, text):
    ids = spelled(tokenizer, CORPUS)
    assert stops_at(tokenizer, ids, text) == CORPUS.encode().index(text.encode()) + len(text.encode())


def test_a_long_run_of_bytes_does_not_hide_a_text(tokenizer):
    """A window that begins inside a character would make the whole run unreadable to a decoder."""
    for shift in range(4):
        ids = spelled(tokenizer, "x" * shift + "日本語" * 9 + "é")
        assert stops_at(tokenizer, ids, "é") == len(ids)


def test_the_first_of_several_texts_ends_the_row(tokenizer):
    assert stops_at(tokenizer, CORPUS, "END", "return", "zzz") == stops_at(tokenizer, CORPUS, "return")
    assert stops_at(tokenizer, CORPUS, "zzz") is None


@pytest.mark.parametrize("text", [t for t in TEXTS if t != " "])
def test_transformers_stops_at_the_same_token(fast, text, tmp_path):
    """Of text whose tokens are whole characters; transformers does not see into byte tokens."""
    transformers = pytest.importorskip("transformers")
    fast.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = fast.encode(CORPUS, add_special_tokens=False)
    if any(fast.convert_ids_to_tokens(i).startswith("<0x") for i in ids) and not text.isascii():
        pytest.skip("spelled in bytes")
    other = transformers.StopStringCriteria(theirs, [text])
    first = next(n for n in range(1, len(ids) + 1) if bool(other(torch.tensor([ids[:n]]), None)[0]))
    assert stops_at(fast, ids, text) == first


def test_what_the_prompt_completed_ends_nothing(tokenizer):
    ids = tokenizer.encode("stop here, and stop", add_special_tokens=False)
    assert stops_at(tokenizer, ids, "stop", prompt=len(ids) - 3) == len(ids)
    assert stops_at(tokenizer, ids[:-1], "here", prompt=len(ids) - 3) is None


def test_a_text_that_ends_where_the_prompt_ends_is_the_prompts(tokenizer):
    """However far the comparison looks back for the longer text."""
    prompt, rest = spelled(tokenizer, "xstop"), spelled(tokenizer, "yyy")
    for texts in (("stop",), ("stop", "a text that is longer than all there is")):
        assert stops_at(tokenizer, prompt + rest, *texts, prompt=len(prompt)) is None
        assert stops_at(tokenizer, prompt + rest, *texts, prompt=len(prompt) - 1) == len(prompt)


def test_a_special_tokens_name_is_a_text(tokenizer):
    assert stops_at(tokenizer, [300, 301, 107, 302], "<end_of_turn>") == 3


def test_in_generate_rows_end_each_for_itself(model, tokenizer):
    ids = torch.tensor([[2, 310, 305], [2, 410, 401], [2, 510, 700]])
    free = model.generate(ids, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    texts = [tokenizer.decode(row[5:8]) for row in free.tolist()[:2]]
    out = model.generate(
        ids, max_new_tokens=12, eos_token_id=None, pad_token_id=0, tokenizer=tokenizer, stop_strings=texts
    )
    table, _ = token_table(tokenizer, model.config.vocab_size)
    for before, after in zip(free[:, 3:].tolist(), out[:, 3:].tolist(), strict=True):
        so_far = [b"".join(table[t] for t in before[:n]) for n in range(1, 13)]
        end = next((n for n, said in enumerate(so_far, 1) if any(t.encode() in said for t in texts)), 12)
        assert after == (before[:end] + [0] * 12)[: len(after)]


def test_a_text_without_a_tokenizer_is_refused(model):
    with pytest.raises(InputError, match="tokenizer="):
        model.generate(torch.tensor([[2, 300]]), stop_strings="x")


def test_max_time_ends_the_run(model):
    def slowly(ids, scores):
        time.sleep(0.05)
        return scores

    out = model.generate(
        torch.tensor([[2, 300]]), max_time=0.2, max_new_tokens=400, eos_token_id=None, logits_processor=[slowly]
    )
    assert 3 <= out.shape[1] < 12


def test_lists_of_criteria_and_eos(model):
    ids = torch.tensor([[2, 310, 305], [2, 410, 401]])
    free = model.generate(ids, max_new_tokens=9, eos_token_id=None)[:, 3:].tolist()
    ends = [free[0][2], free[1][4]]
    out = model.generate(ids, max_new_tokens=9, eos_token_id=ends, pad_token_id=0)[:, 3:].tolist()
    for before, after in zip(free, out, strict=True):
        n = next(i for i, t in enumerate(before) if t in ends) + 1
        assert after == (before[:n] + [0] * 9)[: len(after)]
    seen = gemmakit.StoppingCriteriaList([lambda i, s: i.shape[1] >= 6, lambda i, s: i[:, -1] == free[0][0]])
    out = model.generate(ids, max_new_tokens=9, eos_token_id=None, pad_token_id=0, stopping_criteria=seen)[
        :, 3:
    ].tolist()
    assert out[0][1:] == [0] * (len(out[0]) - 1)
    assert len(out[1]) == 3
