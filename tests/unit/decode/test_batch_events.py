"""What the batch engine tells of a request: text, scores, several answers, times; and whom it takes in."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import BOS, PROMPTS, VOCAB, Letters, alone, check_idle, made, model, poisoned, prompt

from gemmakit.errors import InputError, QueueFull
from gemmakit.pytorch.decode.batch import BatchEngine, Request, generate_batch
from gemmakit.streamers import AnswerText

# float32 sums of a packed pass in another order than those of one prompt; log probabilities are of size 1 to 10.
CLOSE = dict(abs=1e-4)


def run(engine):
    """All events by id and index."""
    told = {}
    while engine.has_work:
        for event in engine.step():
            told.setdefault((event.id, event.index), []).append(event)
    check_idle(engine)
    return told


def only(engine, request):
    (events,) = (events for (id, _), events in run_of(engine, request).items())
    return events


def run_of(engine, request):
    id = engine.add(request)
    return {key: events for key, events in run(engine).items() if key[0] == id}


def tokens_of(events):
    return [event.token for event in events if event.token is not None]


def asked(ids, new=6, **fields):
    own = fields.pop("settings", {})
    return Request(ids, settings=dict(max_new_tokens=new, eos_token_id=None, **own), **fields)


@torch.no_grad()
def expected_logprobs(ids):
    """(n, V): of what follows each token."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


# -- scores ------------------------------------------------------------------------------------------------------------

SETTINGS = [{}, dict(repetition_penalty=1.7), dict(do_sample=True, seed=3, temperature=2.0, top_k=4)]


@pytest.mark.parametrize("own", SETTINGS)
@pytest.mark.parametrize("count", [0, 3, 20])
def test_log_probabilities_are_those_of_the_models_own_logits(own, count):
    events = only(BatchEngine(model), asked(PROMPTS[1], logprobs=count, settings=own))
    ids = PROMPTS[1] + tokens_of(events)
    likely = expected_logprobs(ids)
    for i, event in enumerate(events):
        row = likely[len(PROMPTS[1]) - 1 + i]
        assert event.logprob == pytest.approx(float(row[event.token]), **CLOSE)
        assert len(event.top_logprobs) == count
        assert [p for _, p in event.top_logprobs] == pytest.approx(row.topk(count).values.tolist(), **CLOSE)
        assert all(row[token] == pytest.approx(p, **CLOSE) for token, p in event.top_logprobs)


def test_whoever_asks_for_no_scores_gets_none():
    engine = BatchEngine(model)
    engine.add(asked(PROMPTS[0], logprobs=2))
    silent = engine.add(asked(PROMPTS[1]))
    events = run(engine)[silent, 0]
    assert {(e.logprob, e.top_logprobs, e.prompt_logprobs) for e in events} == {(None, (), None)}


@pytest.mark.parametrize("prefill_tokens", [1, 3, 512])
@pytest.mark.parametrize("new", [0, 2])
def test_a_prompt_is_scored_token_by_token_however_it_is_run(prefill_tokens, new):
    engine = BatchEngine(model, page_size=4, prefill_tokens=prefill_tokens)
    ids = PROMPTS[4]
    engine.add(asked(ids))  # its pages are known by the time the others run, and yet theirs is run whole
    run(engine)
    likely = expected_logprobs(ids)
    for _ in range(2):
        events = only(engine, asked(ids, new, prompt_logprobs=2))
        assert len(tokens_of(events)) == new
        assert events[-1].finish_reason == "length"
        assert events[-1].usage.completion_tokens == new
        scores = events[0].prompt_logprobs
        assert scores[0] is None
        assert [s.token for s in scores[1:]] == ids[1:]
        assert all(event.prompt_logprobs is None for event in events[1:])
        for before, score in zip(likely, scores[1:], strict=False):
            assert score.logprob == pytest.approx(float(before[score.token]), **CLOSE)
            assert [p for _, p in score.top_logprobs] == pytest.approx(before.topk(2).values.tolist(), **CLOSE)


def test_prompt_scores_survive_being_sent_back():
    engine = BatchEngine(model, max_batch_size=4, page_size=4, cache_tokens=48, prefill_tokens=5)
    prompts = [prompt(9, seed=i) for i in range(4)]
    for ids in prompts:
        engine.add(asked(ids, 20, prompt_logprobs=0))
    told = run(engine)
    assert engine.stats().preemptions > 0
    for i, ids in enumerate(prompts):
        scores = told[i, 0][0].prompt_logprobs
        likely = expected_logprobs(ids)
        assert [s.logprob for s in scores[1:]] == pytest.approx(
            [float(likely[j, token]) for j, token in enumerate(ids[1:])], **CLOSE
        )


# -- text --------------------------------------------------------------------------------------------------------------


class Pieces:
    """A tokenizer whose tokens are the texts given; a lone surrogate stands for half a character."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


@given(
    pieces=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    before=st.text("abc", max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_text_is_cut_before_the_first_stop_string_and_never_leaks(pieces, stops, before):
    answer = AnswerText(Pieces(pieces), stops=stops, before=before)
    told = ""
    for i in range(len(pieces)):
        told += answer.push(i, "length" if i == len(pieces) - 1 else None)
        if answer.stopped:
            break
    whole = before + "".join(pieces)
    # A stop string that the prompt completed ends nothing; one that began there does.
    ends = [at for s in stops for at in range(len(whole)) if whole.startswith(s, at) and at + len(s) > len(before)]
    assert answer.stopped == bool(ends)
    if not ends:
        assert told == "".join(pieces)
    elif len(before) <= min(ends):
        # Of two that end in one piece the earlier is cut; of others the one that was complete first.
        assert not any(stop in told for stop in stops)
        assert whole.startswith(before + told)


def test_events_carry_the_text_and_stop_strings_are_left_out():
    ids = PROMPTS[1]
    text = Letters().decode(alone(model, ids, max_new_tokens=9, eos_token_id=None)[len(ids) :])
    for stops in ([text[3:5]], [text[4], text[2:5]], ["?"], [text[:1]]):
        engine = BatchEngine(model)
        events = only(engine, asked(ids, 9, tokenizer=Letters(), settings=dict(stop_strings=stops)))
        cut = min((text.find(s) for s in stops if s in text), default=len(text))
        assert "".join(event.text for event in events) == text[:cut]
        assert events[-1].finish_reason == ("stop" if cut < len(text) else "length")


def test_a_stop_string_that_began_in_the_prompt_is_not_told_either():
    ids = PROMPTS[1]
    new = alone(model, ids, max_new_tokens=9, eos_token_id=None)[len(ids) :]
    stop = Letters().decode([*ids[-2:], *new[:2]])
    events = only(BatchEngine(model), asked(ids, 9, tokenizer=Letters(), settings=dict(stop_strings=stop)))
    assert (tokens_of(events), events[-1].finish_reason) == (new[:2], "stop")
    assert [event.text for event in events] == ["", ""]


def test_no_event_holds_half_a_character(model, fast):
    ids = fast.encode("def f")
    engine = BatchEngine(model)
    wanted = dict(max_new_tokens=40, regex=r"[🙂é]{4}x", eos_token_id=1, do_sample=True, seed=1, temperature=3.0)
    pytest.importorskip("llguidance")
    events = only(engine, Request(ids, settings=wanted, tokenizer=fast))
    text = "".join(event.text for event in events)
    assert text == fast.decode(tokens_of(events), skip_special_tokens=True)
    assert len(tokens_of(events)) > len(text), "the model has no piece for these characters"
    assert not any("\ufffd" in event.text for event in events)


# -- several answers ---------------------------------------------------------------------------------------------------


def test_each_of_n_answers_is_told_by_its_index_and_draws_for_itself():
    own = dict(do_sample=True, seed=5, temperature=1.5)
    told = run_of(BatchEngine(model, page_size=4), asked(PROMPTS[1], 8, n=4, settings=own))
    answers = [tokens_of(told[0, i]) for i in range(4)]
    assert PROMPTS[1] + answers[0] == alone(model, PROMPTS[1], max_new_tokens=8, eos_token_id=None, **own)
    assert len({tuple(a) for a in answers}) == 4
    fewer = run_of(BatchEngine(model, max_batch_size=1), asked(PROMPTS[1], 8, n=2, settings=own))
    assert [tokens_of(fewer[0, i]) for i in range(2)] == answers[:2]


def test_the_answers_to_one_prompt_run_it_once():
    seen = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    try:
        run_of(BatchEngine(model, page_size=4), asked(PROMPTS[4], 1, n=4))
    finally:
        handle.remove()
    assert sum(seen) == 20 + 3 * 4, "of 20 tokens in pages of 4 the last page is run by each"


def test_of_best_of_answers_the_likeliest_are_told_once_all_have_ended():
    own = dict(do_sample=True, seed=2, temperature=2.5)
    engine = BatchEngine(model)
    every = run_of(engine, asked(PROMPTS[1], 5, n=5, logprobs=0, settings=own))
    means = {i: sum(e.logprob for e in every[0, i]) / 5 for i in range(5)}
    order = sorted(means, key=lambda i: -means[i])
    told = run_of(engine, asked(PROMPTS[1], 5, n=2, best_of=5, settings=own))
    assert list(told) == [(1, 0), (1, 1)]
    assert [tokens_of(told[1, i]) for i in range(2)] == [tokens_of(every[0, i]) for i in order[:2]]
    assert all(event.logprob is None for events in told.values() for event in events)


def test_cancelling_ends_every_answer_and_frees_all_pages():
    for steps in range(4):
        engine = BatchEngine(model, max_batch_size=2, page_size=4)
        other = engine.add(asked(PROMPTS[1]))
        id = engine.add(asked(PROMPTS[4], n=3))
        early = [event for _ in range(steps) for event in engine.step()]
        assert engine.cancel(id)
        assert not engine.cancel(id)
        assert {s.id for s in [*engine.scheduler.running, *engine.scheduler.waiting]} <= {0}, "its pages are free now"
        told = run(engine)
        assert [told[id, i][-1].finish_reason for i in range(3)] == ["cancelled"] * 3
        tokens = tokens_of(e for e in early if e.id == other) + tokens_of(told[other, 0])
        assert PROMPTS[1] + tokens == alone(model, PROMPTS[1], max_new_tokens=6, eos_token_id=None)


def test_a_batch_of_results_has_no_place_for_several_answers():
    with pytest.raises(InputError, match="prompt 0: n and best_of ask for 2 answers"):
        generate_batch(model, [Request(PROMPTS[0], n=2)])


@pytest.mark.parametrize(
    "field",
    [dict(n=0), dict(n=1000), dict(best_of=0), dict(n=3, best_of=2), dict(logprobs=21), dict(logprobs=-1),
     dict(prompt_logprobs=1.5), dict(deadline=-1), dict(deadline=math.nan), dict(cache_salt=3)],
)  # fmt: skip
def test_impossible_fields_are_named(field):
    with pytest.raises(InputError, match=rf"{list(field)[-1]} is "):
        BatchEngine(model).add(Request(PROMPTS[0], **field))


# -- usage and state ---------------------------------------------------------------------------------------------------


def test_the_last_event_says_what_the_answer_took():
    engine = BatchEngine(model, page_size=4)
    before = time.monotonic()
    first = only(engine, asked(PROMPTS[4], 3))
    again = only(engine, asked([*PROMPTS[4], 9], 3))
    usage, cached = first[-1].usage, again[-1].usage
    assert [event.usage for event in first[:-1]] == [None, None]
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (20, 0, 3)
    assert (cached.prompt_tokens, cached.cached_tokens) == (21, 20)
    assert 0 <= usage.queued_s <= usage.first_token_s <= usage.total_s <= time.monotonic() - before
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (41, 20)
    assert (stats.running, stats.waiting, stats.cache_usage) == (0, 0, 0.0)


def test_the_state_counts_who_runs_and_waits():
    engine = BatchEngine(model, max_batch_size=2, page_size=4, cache_tokens=400)
    for ids in PROMPTS[:5]:
        engine.add(asked(ids))
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (2, 3)
    assert 0 < stats.cache_usage < 1
    run(engine)


def test_prefixes_are_shared_within_one_salt_only():
    engine = BatchEngine(model, page_size=4)
    cached = [only(engine, asked(PROMPTS[4], cache_salt=salt))[-1].usage.cached_tokens for salt in ("a", "b", "a", "")]
    assert cached == [0, 0, 16, 0]


def test_who_waited_past_its_deadline_ends_and_frees_its_place():
    engine = BatchEngine(model, max_batch_size=1)
    running = engine.add(asked(PROMPTS[0], 4, deadline=0.5))
    engine.step()
    late = engine.add(asked(PROMPTS[1], deadline=0))
    patient = engine.add(asked(PROMPTS[2], 2, deadline=3600))
    told = run(engine)
    assert [(e.token, e.finish_reason) for e in told[late, 0]] == [(None, "timeout")]
    assert told[late, 0][0].usage.first_token_s is None
    assert [told[id, 0][-1].finish_reason for id in (running, patient)] == ["length"] * 2


def test_a_full_queue_refuses_and_what_was_taken_completes():
    engine = BatchEngine(model, max_batch_size=2, max_waiting=3)
    taken = [engine.add(asked(PROMPTS[1], 2)) for _ in range(5)]
    for _ in range(3):
        with pytest.raises(QueueFull, match="5 requests wait, and max_waiting is 3"):
            engine.add(asked(PROMPTS[1], 2))
    told = run(engine)
    assert {key[0] for key in told} == set(taken)
    engine.add(asked(PROMPTS[1], 2))
    run(engine)


def test_waiting_tokens_are_bounded_but_for_who_waits_alone():
    engine = BatchEngine(model, max_batch_size=1, max_waiting_tokens=25)
    engine.add(asked(prompt(40)))
    engine.step()
    engine.add(asked(prompt(40)))
    with pytest.raises(QueueFull, match="max_waiting_tokens is 25"):
        engine.add(asked(PROMPTS[0]))
    run(engine)


def test_an_error_carries_usage_and_spares_the_other_answers():
    engine = BatchEngine(poisoned())
    sick = engine.add(asked([BOS, 50, 7], logprobs=1))
    well = engine.add(asked([BOS, 9, 7], settings=dict(suppress_tokens=[50])))
    told = run(engine)
    assert told[sick, 0][-1].finish_reason == "error"
    assert told[sick, 0][-1].usage.completion_tokens == 0
    assert told[well, 0][-1].finish_reason == "length"


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind():
    small = made(1, num_hidden_layers=1)
    engine = BatchEngine(small, page_size=4, cache_tokens=64)
    sizes = []
    for i in range(10_000):
        engine.add(asked([BOS, 3 + i % (VOCAB - 3)], 2, deadline=3600 if i % 2 else None, cache_salt=str(i)))
        while engine.has_work:
            engine.step()
        if i in (100, 9_999):
            pool = engine.scheduler.pool
            sizes.append(
                [
                    len(x)
                    for x in (engine._rows, engine._requests, engine._deadlines, pool._tree, pool._names, pool.fresh)
                ]
            )
    assert sizes[0] == sizes[1]
    check_idle(engine)
