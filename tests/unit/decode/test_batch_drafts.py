"""Proposals in a batch: a row that checks them is to the bit the row that does not, and they cost what they may."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import BOS, EOS, VOCAB, check_idle, made, prompt

from gemmakit import GemmaConfig, GemmaForCausalLM
from gemmakit.errors import InputError
from gemmakit.pytorch.decode.batch import BatchEngine, Request
from gemmakit.pytorch.decode.batch.drafts import Drafts, price_of
from gemmakit.pytorch.decode.drafts import CREDIT, LOSS, MOST_CREDIT, WIDTH_COST, Gain


def windowed():
    torch.manual_seed(2)
    sizes = {**MODEL.config.to_dict(), "model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 8}
    return GemmaForCausalLM(GemmaConfig.from_dict({**sizes, "layer_types": None})).eval()


MODEL = made()
MODELS = {
    "float32": MODEL,
    "echo": made(seed=3, tie_word_embeddings=True, initializer_range=0.1).to(torch.bfloat16),
    "windows": windowed(),
}
REPEATED = [BOS, *[7, 8, 9, 10] * 4]


def answers(model, requests, speculate, **sizes):
    """All that is told of each answer, the steps it took, and the engine."""
    engine = BatchEngine(model, page_size=4, speculate=speculate, **sizes)
    ids = [engine.add(request) for request in requests]
    told, steps = {id: [] for id in ids}, 0
    while engine.has_work:
        steps += 1
        for e in engine.step():
            told[e.id].append((e.index, e.token, e.finish_reason, e.logprob, tuple(e.top_logprobs), e.prompt_logprobs))
    check_idle(engine)
    return [sorted(told[id], key=lambda event: event[0]) for id in ids], steps, engine


def ask(ids, count=24, n=1, prompt_logprobs=None, **more):
    return Request(
        ids,
        None,
        {"max_new_tokens": count, "eos_token_id": None, **more},
        n=n,
        logprobs=2,
        prompt_logprobs=prompt_logprobs,
    )


def mixed():
    """Rows that propose beside rows that may not, ends of every kind among them."""
    return [
        ask(REPEATED),
        ask(prompt(9, 1), count=40),
        ask(prompt(30, 2), do_sample=True, seed=3),
        ask(REPEATED, repetition_penalty=1.3),
        ask(REPEATED, n=2, prompt_logprobs=1),
        ask(prompt(5, 4), count=1),
        ask(prompt(6, 5), count=30, eos_token_id=list(range(4, 14))),
        ask(prompt(3, 6), count=30, suppress_tokens=[9]),
        ask(REPEATED, do_sample=True, seed=5, temperature=0.3, n=2),
        ask(REPEATED, do_sample=True, seed=6, temperature=2.0, repetition_penalty=1.2, no_repeat_ngram_size=5),
        ask(REPEATED, no_repeat_ngram_size=3, min_new_tokens=9, eos_token_id=[EOS, 7]),
    ]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "sizes", [dict(max_batch_size=1), dict(max_batch_size=4, prefill_tokens=8, cache_tokens=100)], ids=["1", "4"]
)
def test_answers_are_to_the_bit_those_without_proposals(name, sizes, eager, monkeypatch):
    if eager:  # wrong proposals come often
        monkeypatch.setattr(Gain, "count", lambda self, run, most: min(most, run))
    plain, steps, _ = answers(MODELS[name], mixed(), False, **sizes)
    told, fewer, engine = answers(MODELS[name], mixed(), None, **sizes)
    assert told == plain
    stats = engine.stats()
    assert 0 < stats.draft_tokens >= stats.accepted_tokens and (stats.accepted_tokens > 0 or name == "float32")
    assert eager or fewer <= steps


@pytest.mark.parametrize("how", [dict(do_sample=True, seed=5, temperature=0.3), dict(repetition_penalty=1.01)])
def test_sampled_rows_and_those_whose_scores_depend_on_the_past_propose_too(how):
    stats = answers(MODELS["echo"], [ask(REPEATED, count=40, **how)], None)[2].stats()
    assert stats.accepted_tokens > 0


def test_processors_of_ones_own_are_asked_of_what_comes_alone():
    def asked_of(speculate):
        lengths = []
        own = [lambda ids, scores: lengths.append(ids.shape[1]) or scores]
        request = Request(REPEATED, None, {"max_new_tokens": 20, "eos_token_id": None}, logits_processor=own)
        return answers(MODELS["echo"], [request], speculate)[0], lengths

    assert asked_of(None) == asked_of(False)


def test_a_text_that_repeats_takes_few_steps_and_the_same_at_every_run():
    runs = [answers(MODELS["echo"], [ask(REPEATED, count=80)], None, max_batch_size=1) for _ in range(2)]
    assert len(runs[0][0][0]) == 80 and runs[0][1] < 40
    assert runs[0][1] == runs[1][1] and runs[0][2].stats() == runs[1][2].stats()  # no clock is asked


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 40), st.integers(1, 20)), max_size=200))
@settings(deadline=None, max_examples=50)
def test_proposals_never_cost_more_than_they_saved_and_a_share_of_the_time(passes):
    gain, tokens, balance = Drafts().gain, 0, 0.0
    for share, width, run in passes:
        gain.cost = price = price_of(width)
        proposed = gain.count(run, 99)
        accepted = int(share * proposed)
        gain.enter(proposed, accepted)
        tokens, balance = tokens + accepted + 1, balance + accepted - price * proposed
        assert balance >= -LOSS * tokens - CREDIT - 1e-9
        assert proposed * price <= MOST_CREDIT + 1e-9


def test_the_price_is_a_token_s_share_of_its_pass():
    assert price_of(1) == WIDTH_COST["cpu"]
    for tokens in (2, 8, 500):
        cost = 1 + WIDTH_COST["cpu"] * (tokens - 1)
        assert price_of(tokens) == pytest.approx(WIDTH_COST["cpu"] / (cost / tokens))
    assert price_of(10**6) < 1


def test_nothing_is_proposed_where_a_token_could_change_and_the_reason_is_told():
    model = MODELS["float32"]
    assert BatchEngine(model).speculate.why == ""
    assert BatchEngine(model, speculate=False).speculate.why == "speculate is False"
    for options in (dict(batch_invariant=False), dict(overlap=True)):
        assert BatchEngine(model, **options).speculate.why
        with pytest.raises(InputError, match="speculate is True, but"):
            BatchEngine(model, speculate=True, **options)


def test_pages_that_others_may_ask_for_are_left():
    """A row whose proposals would take the last pages goes on by single tokens, and nobody is sent back for them."""
    sizes = dict(max_batch_size=2, cache_tokens=64)
    requests = [ask(REPEATED, count=14), ask(REPEATED[:-1], count=14)]
    plain, _, without = answers(MODELS["float32"], requests, False, **sizes)
    told, _, engine = answers(MODELS["float32"], requests, None, **sizes)
    assert told == plain and engine.stats().preemptions <= without.stats().preemptions


def test_an_eos_among_the_proposals_ends_the_row_there():
    ids = [BOS, *[7, 8, EOS, 9] * 5]
    request = [ask(ids, eos_token_id=[EOS, 7])]
    for name in MODELS:
        assert answers(MODELS[name], request, None)[0] == answers(MODELS[name], request, False)[0]
    assert VOCAB > 50
