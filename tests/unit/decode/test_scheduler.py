"""Pages and scheduling without a model: laws that hold at every step, under any arrivals, endings and cancellations."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmakit.errors import InputError, PromptTooLong
from gemmakit.pytorch.cache.pages import NULL_PAGE, PagePool
from gemmakit.pytorch.decode.batch.scheduler import Scheduler, Sequence


def made(pages=8, page_size=4, share=True, max_batch_size=4, prefill_tokens=16):
    return Scheduler(PagePool(pages, page_size, share), max_batch_size, prefill_tokens)


def added(scheduler, number, tokens, new):
    sequence = Sequence(number, list(tokens), len(tokens) + new)
    scheduler.add(sequence)
    return sequence


def ran(scheduler, token=lambda sequence: 1):
    """Run one step with made-up tokens; sequences that are full leave. Gives the step."""
    step = scheduler.plan()
    for part in step.prefill + step.decode:
        scheduler.advance(part, token(part.sequence) if part.last else None)
        if part.sequence.full:
            scheduler.remove(part.sequence)
    return step


def check_pages(scheduler):
    """No page is lost, held by nobody and yet not idle, or written to by one of several holders."""
    pool = scheduler.pool
    held = Counter(page for s in scheduler.running for page in s.holding.pages)
    assert NULL_PAGE not in held
    assert set(held) | set(pool._idle) == set(range(1, pool.pages + 1))
    assert not set(held) & set(pool._idle)
    assert pool._holders == [held[page] for page in range(pool.pages + 1)]
    for sequence in scheduler.running:
        assert len(sequence.holding.pages) == len(set(sequence.holding.pages))
        written = sequence.holding.pages[sequence.computed // pool.page_size :]
        assert all(held[page] == 1 for page in written), "a page that will be written to is shared"
        assert sequence.computed < len(sequence.tokens) <= sequence.limit
        assert len(sequence.holding.pages) * pool.page_size >= sequence.computed
    assert not any(s.holding.pages or s.computed for s in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.max_batch_size
    order = [s.id for s in scheduler.running] + [s.id for s in scheduler.waiting]
    assert order == sorted(order), "somebody was overtaken"
    for name, (page, _) in pool._tree.items():
        assert pool._names[page] == name
    assert len(pool._names) == len(pool._tree)


def check_step(scheduler, step):
    ids = [part.sequence.id for part in step.prefill + step.decode]
    assert len(ids) == len(set(ids))
    assert sum(part.end - part.start for part in step.prefill) <= scheduler.prefill_tokens
    for part in step.prefill + step.decode:
        assert part.sequence in scheduler.running
        assert part.start == part.sequence.computed
        assert part.start < part.end <= len(part.sequence.holding.pages) * scheduler.pool.page_size
    assert all(part.end - part.start == 1 for part in step.decode)


@st.composite
def _work(draw):
    """Sizes of everything; requests that can run alone; when each arrives, and which are cancelled when."""
    pages, page_size = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    room = pages * page_size
    requests = []
    for _ in range(draw(st.integers(1, 9))):
        prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=min(room, 12)))
        new = draw(st.integers(1, min(12, room + 1 - len(prompt))))
        requests.append((draw(st.integers(0, 5)), prompt, new, draw(st.none() | st.integers(0, 20))))
    requests.sort(key=lambda request: request[0])
    scheduler = made(pages, page_size, draw(st.booleans()), draw(st.integers(1, 5)), draw(st.integers(1, 24)))
    return scheduler, requests


@given(_work())
@settings(max_examples=300, deadline=None)
def test_every_request_ends_and_no_page_is_ever_lost_or_written_by_two(work):
    scheduler, requests = work
    sequences, lost, steps = [], set(), 0
    while scheduler.has_work or len(sequences) < len(requests):
        for arrival, prompt, new, _ in requests[len(sequences) :]:
            if arrival <= steps:
                sequences.append(added(scheduler, len(sequences), prompt, new))
        for sequence, (_, _, _, cancelled) in zip(sequences, requests, strict=False):
            if cancelled == steps and not sequence.full:
                lost.add(sequence.id)
                scheduler.remove(sequence)
        step = scheduler.plan()
        check_step(scheduler, step)
        check_pages(scheduler)
        if scheduler.has_work:
            assert step.prefill or step.decode, "work is left and nothing runs"
        again = scheduler.plan()  # an interrupted step is planned again, and nothing was lost
        assert [(p.sequence.id, p.start, p.end) for p in again.decode + again.prefill] == [
            (p.sequence.id, p.start, p.end) for p in step.decode + step.prefill
        ]
        ran(scheduler, token=lambda s: len(s.tokens) % 2)
        check_pages(scheduler)
        steps += 1
        assert steps < 5000
    for sequence, (_, prompt, new, _) in zip(sequences, requests, strict=True):
        assert sequence.tokens[: len(prompt)] == prompt
        assert sequence.id in lost or len(sequence.tokens) == len(prompt) + new
    assert scheduler.pool.idle == scheduler.pool.pages


def test_a_request_that_could_never_run_is_refused_with_both_counts_and_the_remedy():
    scheduler = made(pages=4, page_size=4)
    with pytest.raises(PromptTooLong, match=r"15 tokens and may get 3 .* holds 16.* at most 2 .*cache_tokens=18"):
        added(scheduler, 0, [1] * 15, 3)
    with pytest.raises(PromptTooLong, match=r"17 tokens and may get 1 .*Shorten the prompt, or pass cache_tokens=18"):
        added(scheduler, 0, [1] * 17, 1)
    assert not scheduler.has_work
    added(scheduler, 1, [1] * 15, 2)  # the last token is never run, so 17 tokens fit in 16 places


def test_a_request_without_a_token_or_room_is_refused():
    for tokens, new in (([], 3), ([1, 2], 0)):
        with pytest.raises(InputError, match="nothing to run"):
            added(made(), 0, tokens, new)


def test_a_request_that_fits_exactly_runs_to_its_end_alone():
    scheduler = made(pages=3, page_size=4)
    sequence = added(scheduler, 0, range(5), 8)  # 12 stored tokens in 3 pages
    while scheduler.has_work:
        ran(scheduler)
    assert len(sequence.tokens) == 13
    assert scheduler.preemptions == 0


def test_a_long_prompt_runs_in_parts_beside_rows_that_go_on():
    scheduler = made(pages=20, prefill_tokens=8)
    short = added(scheduler, 0, [1], 10)
    ran(scheduler)
    long = added(scheduler, 1, range(20), 2)
    for computed in (8, 16):
        step = ran(scheduler)
        assert [part.sequence for part in step.decode] == [short]
        assert [(part.end, part.last) for part in step.prefill] == [(computed, False)]
    step = ran(scheduler)
    assert [part.last for part in step.prefill] == [True]
    assert len(long.tokens) == 21
    assert len(short.tokens) == 5


def test_the_prompt_budget_is_shared_by_the_prompts_of_a_step():
    scheduler = made(pages=20, prefill_tokens=10)
    for i in range(3):
        added(scheduler, i, [i] * 6, 2)
    step = ran(scheduler)
    assert [(part.sequence.id, part.start, part.end) for part in step.prefill] == [(0, 0, 6), (1, 0, 4)]
    assert len(scheduler.waiting) == 1, "nobody enters, and takes pages, without something to run"
    step = ran(scheduler)
    assert [(part.sequence.id, part.start, part.end) for part in step.prefill] == [(1, 4, 6), (2, 0, 6)]


def test_rows_that_finish_make_room_at_once():
    scheduler = made(pages=4, page_size=4, max_batch_size=1)
    added(scheduler, 0, [1] * 5, 1)
    added(scheduler, 1, [2] * 5, 1)
    ran(scheduler)
    assert scheduler.pool.idle == 4
    assert not scheduler.running
    assert [part.sequence.id for part in ran(scheduler).prefill] == [1]


def test_the_youngest_goes_back_with_its_tokens_and_is_the_first_to_return():
    scheduler = made(pages=4, page_size=2, share=False)
    old, young = added(scheduler, 0, [1, 1], 6), added(scheduler, 1, [2, 2], 6)
    last = added(scheduler, 2, [3], 1)
    while not scheduler.preemptions:
        ran(scheduler)
    assert young in scheduler.waiting
    assert len(young.tokens) > 2, "what it has is kept"
    assert young.computed == 0
    assert not young.holding.pages
    assert list(scheduler.waiting) == [young, last]
    kept = len(young.tokens)
    while old in scheduler.running:
        ran(scheduler)
    step = scheduler.plan()
    assert [(p.sequence, p.start, p.end) for p in step.prefill] == [(young, 0, kept)], "all of it is run again"


def test_a_prompt_seen_before_is_not_computed_again():
    scheduler = made(pages=8, page_size=4)
    added(scheduler, 0, range(11), 1)
    ran(scheduler)
    added(scheduler, 1, [*range(8), 99, 98, 97], 1)  # two whole pages are the same
    step = ran(scheduler)
    assert [(part.start, part.end) for part in step.prefill] == [(8, 11)]
    added(scheduler, 2, range(8), 1)  # the same two pages, but one token must be run to have logits
    assert [(part.start, part.end) for part in ran(scheduler).prefill] == [(4, 8)]


def test_two_that_run_share_the_pages_of_what_they_have_in_common():
    scheduler = made(pages=8, page_size=4)
    first = added(scheduler, 0, range(9), 9)
    ran(scheduler)
    second = added(scheduler, 1, range(9), 9)
    ran(scheduler)
    assert first.holding.pages[:2] == second.holding.pages[:2]
    assert first.holding.pages[2] != second.holding.pages[2]
    check_pages(scheduler)
    scheduler.remove(first)
    check_pages(scheduler)
    assert set(second.holding.pages).isdisjoint(scheduler.pool._idle)


def test_an_answer_can_begin_the_next_question():
    scheduler = made(pages=8, page_size=4)
    turn = added(scheduler, 0, [5, 6, 7], 7)
    while scheduler.has_work:
        ran(scheduler)
    added(scheduler, 1, [*turn.tokens, 8, 9], 1)
    assert [(part.start, part.end) for part in ran(scheduler).prefill] == [(8, 12)]


def test_nothing_is_shared_when_sharing_is_off():
    scheduler = made(pages=8, page_size=4, share=False)
    for i in range(2):
        added(scheduler, i, range(9), 1)
        assert [(part.start, part.end) for part in ran(scheduler).prefill] == [(0, 9)]


def test_a_page_that_was_given_out_again_is_no_longer_found():
    scheduler = made(pages=3, page_size=4)
    added(scheduler, 0, range(9), 1)
    ran(scheduler)
    added(scheduler, 1, range(100, 109), 1)  # takes all three pages
    ran(scheduler)
    assert scheduler.pool.find(list(range(9))).pages == ()
    assert len(scheduler.pool.find(list(range(100, 109))).pages) == 2


def test_of_idle_pages_those_without_a_known_prefix_go_first():
    pool = PagePool(pages=3, page_size=2)
    known, unknown = pool.hold(2), pool.hold(1)
    pool.remember(known, [1, 1, 2, 2])
    pages = list(known.pages)
    last = unknown.pages[0]
    pool.release(known)
    pool.release(unknown)
    assert pool.hold(1).pages == [last]
    assert pool.find([1, 1, 2, 2, 3]).pages == tuple(pages)


def test_of_known_pages_the_longest_idle_goes_first_and_a_chain_loses_its_end():
    pool = PagePool(pages=4, page_size=2)
    one, two = pool.hold(2), pool.hold(2)
    pool.remember(one, [1, 1, 2, 2])
    pool.remember(two, [3, 3, 4, 4])
    pool.release(one)
    pool.release(two)
    pool.hold(1)
    assert len(pool.find([1, 1, 2, 2, 0]).pages) == 1
    pool.hold(2)
    assert len(pool.find([1, 1, 2, 2, 0]).pages) == 0
    assert len(pool.find([3, 3, 4, 4, 0]).pages) == 1


def test_too_few_pages_change_nothing():
    pool = PagePool(pages=4, page_size=2)
    a = pool.hold(2)
    pool.remember(a, [1, 2, 3, 4])
    pool.release(a)
    prefix = pool.find([1, 2, 3, 4, 5])
    assert len(prefix.pages) == 2
    assert pool.hold(5, prefix) is None
    assert pool.idle == 4
    held = pool.hold(4, prefix)
    assert held.pages[:2] == list(prefix.pages)
    assert not pool.grow(held, 5)
    assert len(held.pages) == 4


def test_releasing_a_page_twice_is_noticed():
    pool = PagePool(pages=2, page_size=2)
    held = pool.hold(1)
    pages = list(held.pages)
    pool.remember(held, [1, 2])
    pool.release(held)
    assert (held.pages, held.known, held.node) == ([], 0, "")
    pool.release(held)  # empty by now
    held.pages = pages
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(held)


def test_pages_are_told_to_be_cleared_before_each_new_owner():
    pool = PagePool(pages=2, page_size=2)
    held = pool.hold(2)
    assert sorted(pool.fresh) == [1, 2]
    pool.fresh.clear()
    pool.release(held)
    pool.hold(1)
    assert len(pool.fresh) == 1
