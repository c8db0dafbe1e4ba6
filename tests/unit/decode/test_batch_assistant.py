"""A smaller model that proposes to the rows of a batch: nothing they are told changes, and it is asked if it pays."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import BOS, VOCAB, check_idle, check_pages, made, prompt
from test_batch_drafts import MODELS, REPEATED, answers, ask, mixed

from gemmakit.errors import InputError, NotEnoughMemory
from gemmakit.pytorch.cache.paged import bytes_per_token
from gemmakit.pytorch.decode.batch import BatchEngine, Request, generate_batch
from gemmakit.pytorch.decode.batch.drafts import Drafts
from gemmakit.pytorch.decode.drafts import LOSS, MOST_CREDIT, TRIED_AGAIN, Gain, ModelGain

SMALL = 2  # layers of a draft


def sure(model):
    """A draft that ends no proposal for being unsure of it."""
    model.generation_config = model.generation_config.updated(assistant_confidence_threshold=0.0)
    return model


def deep(layers=12, **fields):
    """A model whose layers behind the first two add nothing."""
    model = made(num_hidden_layers=layers, **fields)
    with torch.no_grad():
        for layer in model.model.layers[SMALL:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def first_layers(model, **fields):
    """What gives the same logits by a few layers."""
    small = made(num_hidden_layers=SMALL, **fields)
    whole = model.state_dict()
    small.load_state_dict({name: whole[name] for name in small.state_dict()})
    return sure(small)


def broken(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    return model


DEEP = deep()
RIGHT, OTHER = first_layers(DEEP), sure(made(seed=9, num_hidden_layers=1))
UNSURE = copy.deepcopy(RIGHT)
UNSURE.generation_config = UNSURE.generation_config.updated(assistant_confidence_threshold=0.9)
DRAFTS = {"right": RIGHT, "another": OTHER, "unsure": UNSURE, "nan": broken(OTHER)}


class Passes:
    """The widths of a model's passes while it is watched."""

    def __init__(self, model):
        self.model, self.widths = model, []

    def __enter__(self):
        def note(_, given, named):
            self.widths.append((given[0] if given else named["input_ids"]).shape[1])

        # On the decoder: a hook on the draft is none on the model, whose bits are not asked to be its own.
        self.hook = self.model.model.register_forward_pre_hook(note, with_kwargs=True)
        return self.widths

    def __exit__(self, *_):
        self.hook.remove()


# -- nothing changes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    "sizes", [dict(max_batch_size=1), dict(max_batch_size=4, prefill_tokens=8, cache_tokens=100)], ids=["1", "4"]
)
def test_answers_are_to_the_bit_those_without_a_draft_model(draft, sizes, eager, monkeypatch):
    if eager:  # whatever it costs
        monkeypatch.setattr(Gain, "count", lambda self, run, most: min(most, run))
    plain, steps, _ = answers(DEEP, mixed(), False, **sizes)
    told, fewer, engine = answers(DEEP, mixed(), None, assistant_model=DRAFTS[draft], **sizes)
    assert told == plain
    stats = engine.stats()
    assert stats.draft_tokens >= stats.assistant_draft_tokens > 0
    assert stats.accepted_tokens >= stats.assistant_accepted_tokens
    assert (stats.assistant_accepted_tokens > 0) >= (draft == "right")
    assert eager or fewer <= steps


@pytest.mark.parametrize("name", ["echo", "windows"])
def test_other_dtypes_and_windows_are_kept_apart_from_the_drafts(name):
    """The draft is float32 beside a bfloat16 model, and has no windows beside one that has."""
    for draft in (RIGHT, MODELS[name]):
        found = answers(MODELS[name], mixed(), None, max_batch_size=3, assistant_model=sure(draft))
        assert found[0] == answers(MODELS[name], mixed(), False, max_batch_size=3)[0]


lives = st.lists(
    st.tuples(
        st.integers(0, 6),  # the step before which it comes
        st.integers(1, 24),  # tokens of its prompt
        st.integers(1, 30),  # new ones
        st.sampled_from([{}, dict(do_sample=True, seed=1), dict(do_sample=True, seed=2, repetition_penalty=1.2)]),
        st.sampled_from([1, 1, 2]),  # answers
        st.one_of(st.none(), st.integers(0, 9)),  # the step before which it is cancelled
    ),
    min_size=1,
    max_size=6,
)


@given(lives, st.sampled_from(["right", "another", "nan"]), st.integers(12, 40), st.booleans())
@settings(deadline=None, max_examples=20)
def test_whoever_comes_and_goes_each_gets_what_it_gets_without_a_draft_model(lives, draft, pages, share):
    def told(**more):
        sizes = dict(page_size=4, cache_tokens=4 * max(pages, 14), max_batch_size=3, prefill_tokens=8)
        engine = BatchEngine(DEEP, share_prefixes=share, **sizes, **more)
        found, step = {}, 0
        while engine.has_work or step <= 6:
            for i, (begins, length, count, how, n, _) in enumerate(lives):
                if begins == step:
                    request = Request(prompt(length, length % 3), None,
                                      {"max_new_tokens": count, "eos_token_id": [5, 6], **how}, n=n)  # fmt: skip
                    found[engine.add(request)] = (i, {})
            for id, (i, _) in found.items():
                if lives[i][-1] == step and more:
                    engine.cancel(id)
            for event in engine.step():
                found[event.id][1].setdefault(event.index, []).append((event.token, event.finish_reason))
            check_pages(engine)
            step += 1
        check_idle(engine)
        return dict(found.values())

    plain, found = told(), told(assistant_model=DRAFTS[draft])
    assert plain.keys() == found.keys()
    for i, answers_ in found.items():
        for index, events in answers_.items():
            cut = events[:-1] if events[-1][1] == "cancelled" else events
            assert cut == plain[i][index][: len(cut)] and (len(cut) < len(events) or events == plain[i][index])


def test_a_grammar_is_followed_by_proposals_too(fast, monkeypatch):
    pytest.importorskip("llguidance")
    monkeypatch.setattr(Gain, "count", lambda self, run, most: most)  # most of either model is its vocabulary
    vocabulary = len(fast.get_vocab())
    model = deep(vocab_size=vocabulary)
    draft = first_layers(model, vocab_size=vocabulary)
    requests = [
        Request(
            fast.encode("def f"),
            None,
            dict(max_new_tokens=20, regex=r"(yes|no|maybe) [0-9]{3,5}x{2,6}", eos_token_id=1, **how),
            tokenizer=fast,
        )
        for how in ({}, dict(do_sample=True, seed=3))
    ]
    told, _, engine = answers(model, requests, None, assistant_model=draft)
    assert told == answers(model, requests, False)[0]
    assert engine.stats().assistant_accepted_tokens > 0


# -- what it gives and costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "how"), [(1, {}), (1, dict(do_sample=True, seed=4)), (4, {}), (4, dict(repetition_penalty=1.2))]
)
def test_a_draft_that_is_right_gives_several_tokens_a_step(rows, how):
    model = deep(24)  # so that its first layers are cheap beside it
    draft = first_layers(model)
    requests = [ask(prompt(9, seed), count=64, **how) for seed in range(rows)]
    with Passes(draft) as widths:
        told, steps, engine = answers(model, requests, None, assistant_model=draft)
    stats = engine.stats()
    assert stats.assistant_draft_tokens == stats.assistant_accepted_tokens > 0
    # Alone a row may check seven at a time, and in time does; four at once get as many by fewer proposals each, since
    # the width of their pass costs as much as that of another row.
    assert len(told[0]) == 64 and steps < 64 / (4 if rows == 1 else 2)
    assert len(widths) < 2 + stats.assistant_draft_tokens / rows * 2, "rows do not share the draft's passes"


def test_a_draft_that_is_never_right_is_soon_left_and_costs_no_step():
    requests = [ask(prompt(9, seed), count=100) for seed in range(3)]
    _, steps, _ = answers(DEEP, requests, False)
    for draft in (OTHER, broken(OTHER)):
        _, taken, engine = answers(DEEP, requests, None, assistant_model=draft)
        stats = engine.stats()
        assert taken <= steps
        # A row books its passes at their price, which is above that of a token's check.
        wrong = stats.assistant_draft_tokens - stats.assistant_accepted_tokens
        assert 0 < wrong <= 3 * (MOST_CREDIT + LOSS * 100) / 0.25 + stats.assistant_accepted_tokens / 0.25


def test_what_one_answer_found_out_others_need_not_pay_for():
    def proposed(count):
        requests = [ask(prompt(9, seed), count=40) for seed in range(count)]
        return answers(DEEP, requests, None, max_batch_size=1, assistant_model=OTHER)[2].stats().assistant_draft_tokens

    assert 0 < proposed(6) < 2 * proposed(1)


def test_a_draft_as_large_as_its_model_is_not_asked():
    stats = answers(DEEP, [ask(prompt(9, 1))], None, assistant_model=sure(copy.deepcopy(DEEP)))[2].stats()
    assert stats.assistant_draft_tokens == 0


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.26, 3)), max_size=300))
@settings(deadline=None, max_examples=50)
def test_what_a_model_proposes_never_costs_more_than_it_saved_and_a_share_of_the_time(passes):
    gain, tokens, balance = ModelGain(0.3, RIGHT.generation_config), 0, 0.0
    for share, price in passes:
        gain.cost = price
        proposed = gain.wanted(7)
        accepted = int(share * proposed)
        gain.enter(proposed, accepted)
        tokens, balance = tokens + accepted + 1, balance + accepted - price * proposed
        assert balance >= -LOSS * tokens - MOST_CREDIT - 1e-9


def test_a_draft_that_did_not_pay_is_tried_again():
    gain, asked = ModelGain(0.3, RIGHT.generation_config), []
    for step in range(4 * TRIED_AGAIN):
        if proposed := gain.wanted(7):
            asked.append(step)
        gain.enter(proposed, 0)
    assert len([step for step in asked if step > TRIED_AGAIN]) in (1, 2, 3)


def test_the_text_itself_is_asked_before_a_model_that_is_no_likelier_right():
    drafts = Drafts(ModelGain(0.3, RIGHT.generation_config))
    drafts.repeats.extend([1, 2, 3] * 8)
    assert drafts.asks(()) and not drafts.asks((1, 2))
    for _ in range(20):
        drafts.gain.saw(drafts.repeats.run, False)
    assert drafts.asks((1, 2)) and not Drafts().asks(())


def test_the_same_requests_take_the_same_steps_at_every_run():
    runs = [answers(DEEP, mixed(), None, max_batch_size=3, assistant_model=RIGHT) for _ in range(2)]
    assert runs[0][1] == runs[1][1] and runs[0][2].stats() == runs[1][2].stats()  # no clock is asked


# -- what it reads -----------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_read_in_parts_beside_the_others():
    with Passes(RIGHT) as widths:
        answers(DEEP, [ask(prompt(60, 1)), ask(prompt(9, 2))], None, prefill_tokens=8, assistant_model=RIGHT)
    assert max(widths) <= 8 + 2 and sum(widths) >= 69


def test_what_rows_share_is_read_once(monkeypatch):
    monkeypatch.setattr(Gain, "count", lambda self, run, most: most)
    ids = prompt(41, 3)

    def read(requests):
        with Passes(RIGHT) as widths:
            stats = answers(DEEP, requests, None, assistant_model=RIGHT)[2].stats()
        return sum(widths), stats.assistant_draft_tokens

    one, drafted = read([ask(ids, count=12, do_sample=True, seed=1)])
    four, drafted_by_four = read([ask(ids, count=12, do_sample=True, seed=1, n=4)])
    assert one > 41
    assert four - one < 3 * 41 / 2 + drafted_by_four - drafted + 3 * 12


def test_a_row_stays_within_the_positions_of_its_draft():
    short = first_layers(DEEP, max_position_embeddings=32)
    with Passes(short) as widths:
        told, _, engine = answers(DEEP, [ask(prompt(20, 1), count=60)], None, assistant_model=short)
    assert told == answers(DEEP, [ask(prompt(20, 1), count=60)], False)[0]
    assert 0 < engine.stats().assistant_draft_tokens < 16 and sum(widths) < 64


# -- around it ---------------------------------------------------------------------------------------------------------


def test_generate_batch_takes_it_too():
    asked = dict(max_new_tokens=20, eos_token_id=None)
    prompts = [prompt(n, n) for n in (3, 9, 5)]
    with Passes(RIGHT) as widths:
        found = generate_batch(DEEP, prompts, assistant_model=RIGHT, **asked)
    assert widths and found == generate_batch(DEEP, prompts, **asked)


def test_the_memory_asked_for_holds_both_caches():
    both = sum(bytes_per_token(one.config, one.dtype) for one in (DEEP, RIGHT))
    engine = BatchEngine(DEEP, page_size=4, cache_bytes=4 * 30 * both, assistant_model=RIGHT)
    assert engine.nbytes == 4 * 30 * both and engine.scheduler.pool.pages == 29
    with pytest.raises(NotEnoughMemory, match=r"the model and its assistant needs.*cache_tokens"):
        BatchEngine(DEEP, cache_tokens=10**12, assistant_model=RIGHT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            dict(assistant_model=made(vocab_size=VOCAB + 1)),
            f"vocabulary of {VOCAB + 1} ids and this model one of {VOCAB}",
        ),
        (dict(assistant_model=torch.nn.Linear(2, 2)), "Linear; it must be a gemmakit"),
        (dict(assistant_model=RIGHT, speculate=False), "speculate is False"),
        (dict(assistant_model=RIGHT, overlap=True), "overlap"),
        (dict(assistant_model=RIGHT, batch_invariant=False), "batch_invariant is False"),
        (dict(assistant_model=made(num_hidden_layers=1).to("meta")), "is on meta and the model on cpu"),
    ],
)
def test_a_draft_model_that_cannot_help_is_refused_before_memory_is_taken(options, said, monkeypatch):
    monkeypatch.setattr("gemmakit.pytorch.decode.batch.engine.PagedCache", None)
    with pytest.raises(InputError, match=said):
        BatchEngine(DEEP, **options)


def test_what_interrupts_a_draft_leaves_everything_as_it_was(monkeypatch):
    requests = [ask(prompt(9, 1), count=30, do_sample=True, seed=1), ask(REPEATED, count=30), ask([BOS], count=9)]
    engine = BatchEngine(DEEP, page_size=4, assistant_model=RIGHT)
    ids, told, calls = [engine.add(request) for request in requests], {}, []

    def interrupts(*_):
        calls.append(1)
        if len(calls) % 3 == 2 and len(calls) < 60:  # a step of several passes would never end
            raise KeyboardInterrupt

    hook = RIGHT.model.register_forward_pre_hook(interrupts)
    try:
        while engine.has_work:
            with suppress(KeyboardInterrupt):
                for event in engine.step():
                    told.setdefault(event.id, []).append(event.token)
    finally:
        hook.remove()
    assert len(calls) > 6
    plain = answers(DEEP, requests, False)[0]
    assert [told[id] for id in ids] == [[event[1] for event in one] for one in plain]
