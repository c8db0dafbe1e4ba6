"""generate() of the members with windows against transformers, prompts and answers several windows long, in float32."""

import pytest
import torch
from parity_tools import batch
from tiny_shapes import MEMBERS, WINDOW

pytestmark = pytest.mark.filterwarnings("ignore")
NEW = 2 * WINDOW + 5
WIDTH = 4 * WINDOW + 3
ENDS = dict(eos_token_id=[1, 9], pad_token_id=0)
PROCESSORS = {"none": {}, "some": dict(repetition_penalty=1.3, no_repeat_ngram_size=3, min_new_tokens=WINDOW)}
everyone = pytest.mark.parametrize("member", MEMBERS)


def answers(pair, member, padding, **asked):
    both = pair("gqa", member=member)
    ids, mask = batch(padding, width=WIDTH)
    mask = torch.ones_like(ids) if mask is None else mask
    asked = {**dict(max_new_tokens=NEW, do_sample=False, **ENDS), **asked}
    return [model.generate(ids, attention_mask=mask, **asked) for model in (both.ours, both.theirs)]


def texts(sequences):
    """New tokens up to an end, for a search of transformers fills the rest with an eos."""
    rows = sequences[:, WIDTH:].tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in ENDS["eos_token_id"]), None)] for row in rows]


@everyone
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("cache", [{}, dict(cache_implementation="static")], ids=["dynamic", "static"])
def test_greedy_tokens(pair, member, padding, processors, cache):
    mine, other = answers(pair, member, padding, **PROCESSORS[processors], **cache)
    assert texts(mine) == texts(other)


@everyone
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("processors", PROCESSORS)
def test_beams(pair, member, padding, processors):
    mine, other = answers(pair, member, padding, num_beams=3, num_return_sequences=2, **PROCESSORS[processors])
    assert texts(mine) == texts(other)


@everyone
@pytest.mark.parametrize("padding", ["none", "left"])
def test_drafts_and_the_batch_engine_change_no_token(pair, member, padding):
    both = pair("gqa", member=member, tie_word_embeddings=False)  # tied, it says what it reads
    ids, mask = batch(padding, width=WIDTH)
    asked = dict(max_new_tokens=NEW, do_sample=False, **ENDS)
    rows = [row if mask is None else row[mask[i].bool()] for i, row in enumerate(ids)]
    rows = [row for row in rows if len(row)]
    theirs = [both.theirs.generate(row[None], attention_mask=torch.ones_like(row[None]), **asked) for row in rows]
    wanted = [tokens[0].tolist() for tokens in theirs]
    together = both.ours.generate_batch([row.tolist() for row in rows], **asked)
    assert [list(result.ids) for result in together] == wanted
    for row, tokens in zip(rows, wanted, strict=True):
        drafted = both.ours.generate(row[None], prompt_lookup_num_tokens=3, **asked)
        assert drafted[0].tolist() == tokens


@everyone
def test_the_distribution_drawn_from(pair, member):
    """Draw with ours, then ask transformers for the scores of each step after what was drawn."""
    both = pair("gqa", member=member)
    ids, _ = batch("none", width=WIDTH)
    wanted = dict(
        do_sample=True, top_k=40, top_p=0.95, return_dict_in_generate=True, output_scores=True, pad_token_id=0
    )
    mine = both.ours.generate(ids, seed=4, max_new_tokens=NEW, eos_token_id=None, **wanted)
    for step in range(0, NEW, 4):
        so_far = mine.sequences[:, : WIDTH + step]
        whole = torch.ones_like(so_far)
        other = both.theirs.generate(so_far, attention_mask=whole, max_new_tokens=1, eos_token_id=None, **wanted)
        a, b = mine.scores[step].softmax(-1), other.scores[0].softmax(-1)
        torch.testing.assert_close(a, b, rtol=5e-4, atol=5e-4)
