"""Drafts do not change the distribution, and looking tokens up does not cost time."""

import copy
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from strategy_models import BOS, model, rows, settings

from gemmakit import GenerationConfig
from gemmakit.pytorch.decode.drafts import CLIMBED, CREDIT, LOSS, MARGIN, Gain, ModelGain, Repeats, Rewound
from gemmakit.pytorch.decode.generate import begin
from gemmakit.pytorch.decode.sampling import Exponential
from gemmakit.pytorch.decode.strategies import assisted
from gemmakit.pytorch.decode.strategies.assisted import DraftModel

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("warped", [{}, dict(temperature=0.7, top_k=4), dict(repetition_penalty=1.3)])
@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_assisted_sampling_draws_the_tokens_of_plain_sampling(warped, threshold, spread, monkeypatch):
    """To the last, and leaves the generator where plain sampling leaves it, right drafts or wrong."""
    monkeypatch.setattr(Gain, "count", lambda self, run, most: most)
    target, helper = model(seed=2, spread=spread), model(seed=3, spread=spread, layers=1)
    drafts = dict(assistant_model=helper, num_assistant_tokens=3, assistant_confidence_threshold=threshold)
    asked = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": None, "pad_token_id": 0, "top_k": 0, **warped}
    passes = []
    hook = target.register_forward_hook(lambda *_: passes.append(1))
    try:
        for seed in range(4):
            found, states = [], []
            for more in ({}, drafts):
                generator = torch.Generator().manual_seed(seed)
                found.append(target.generate(torch.tensor([[BOS, 5, 3]]), generator=generator, **asked, **more))
                states.append(generator.get_state())
            assert torch.equal(*found) and torch.equal(*states)
    finally:
        hook.remove()
    assert len(passes) < 160 or spread > 0.1  # models that know little agree, since they draw by the same noise


def test_a_draft_model_of_nan_changes_nothing():
    helper = copy.deepcopy(model(seed=9, layers=1))
    with torch.no_grad():
        helper.model.norm.weight.fill_(torch.nan)
    given = dict(max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    for how in ({}, dict(do_sample=True, seed=1)):
        plain = model().generate(torch.tensor([[BOS, 5, 3]]), **given, **how)
        assert torch.equal(model().generate(torch.tensor([[BOS, 5, 3]]), assistant_model=helper, **given, **how), plain)


def test_a_draft_model_that_is_never_right_is_seldom_asked():
    helper, asked = model(seed=9, layers=1), []
    ids = torch.tensor([[BOS, 5, 3]])
    made = begin(model(), ids, assistant_model=helper, assistant_confidence_threshold=0.0, max_new_tokens=40)
    drafter = DraftModel(model(), made.prompt, made.plan)
    hook = helper.register_forward_hook(lambda *_: asked.append(1))
    try:
        for _ in range(400):
            tokens = drafter.propose(ids, [], 7)
            count = 0 if tokens is None else len(tokens)
            drafter.learn(count, 0, 1.0 + 0.5 * count)
    finally:
        hook.remove()
    assert 0 < len(asked) < 20


def test_the_schedule_follows_what_was_right():
    asked = dict(num_assistant_tokens=5, num_assistant_tokens_schedule="heuristic")
    gain = ModelGain(0.3, GenerationConfig(**asked))
    for proposed, accepted, then in ((5, 5, 7), (7, 3, 6), (6, 0, 5), (0, 0, 5)):
        gain.enter(proposed, accepted, 0.0)
        assert gain.most == then
    fixed = ModelGain(0.3, GenerationConfig(**{**asked, "num_assistant_tokens_schedule": "constant"}))
    fixed.enter(5, 5, 0.0)
    assert fixed.most == 5


def test_the_assistants_own_settings_count_where_the_call_says_nothing(monkeypatch):
    monkeypatch.setattr(Gain, "count", lambda self, run, most: most)
    helper = model(seed=9, layers=1)
    asked = []
    hook = helper.register_forward_hook(lambda *a: asked.append(1))
    before = helper.generation_config
    try:
        helper.generation_config = before.updated(num_assistant_tokens=2, assistant_confidence_threshold=0.0)
        for more, per_round in (({}, 2), (dict(num_assistant_tokens=4), 4)):
            asked.clear()
            given = settings("assisted", assistant_model=lambda: helper, max_new_tokens=per_round + 2, **more)
            model().generate(torch.tensor(rows(5)), **{**given, "eos_token_id": None})
            assert asked[:per_round] == [1] * per_round
    finally:
        helper.generation_config = before
        hook.remove()


# -- prompt lookup ---------------------------------------------------------------------------------------------------


texts = st.integers(1, 4).flatmap(lambda letters: st.lists(st.integers(1, letters), min_size=1, max_size=60))


@given(texts, st.one_of(st.just(99), st.integers(1, 5)), st.integers(1, 8))
@examples(max_examples=300, deadline=None)
def test_what_is_proposed_followed_the_longest_run_that_came_before(tokens, longest, count):
    repeats = Repeats(longest)
    for token in tokens:
        repeats.extend([token])
    n = len(tokens)
    known = [
        s for s in range(1, min(longest, n - 1) + 1) if any(tokens[e - s : e] == tokens[n - s :] for e in range(s, n))
    ]
    assert repeats.run == max(known, default=0)
    found = repeats.continuation(count)
    if not known:
        assert found == []
        return
    places = [e for e in range(repeats.run, n) if tokens[e - repeats.run : e] == tokens[n - repeats.run :]]
    text = {place: list(tokens) for place in places}
    for place, whole in text.items():
        for _ in range(count):
            whole.append(whole[place + len(whole) - n])
    assert found in [whole[n:] for whole in text.values()]
    if len(tokens) <= CLIMBED:  # states enough for all that the text ends with
        assert found == text[places[-1]][n:]


def test_a_text_of_one_token_takes_no_longer_for_being_long():
    """States of the text's end are as many as its tokens; so many are looked at."""
    repeats, touched = Repeats(), []
    repeats._link = type(
        "Counted", (list,), {"__getitem__": lambda self, i: touched.append(i) or list.__getitem__(self, i)}
    )([-1])
    repeats.extend([7] * 4000)
    assert repeats.run == 3999 and repeats.continuation(3) == [7, 7, 7]
    assert len(touched) < 4000 * (CLIMBED + 4)


chances = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@given(st.floats(0.01, 1.0), chances, st.integers(1, 12), st.integers(0, 2**31))
@examples(max_examples=150, deadline=None)
def test_bad_proposals_never_lose_more_than_the_share_allowed(cost, quality, most, seed):
    """In passes over one token; quality: the chance that a proposed token is right, changing over the text."""
    gain, chance = Gain(cost), random.Random(seed)
    spent = decided = 0.0
    for step in range(300):
        k = gain.count(chance.randint(1, 20), most)
        right = 0
        while right < k and chance.random() < quality[step % len(quality)]:
            right += 1
        gain.enter(k, right)
        spent += 1 + cost * k
        decided += right + 1
        assert spent <= (1 + LOSS) * decided + CREDIT + 1e-6


@given(st.floats(0.01, 1.0), st.integers(1, 20), st.lists(st.booleans(), min_size=40, max_size=40), st.integers(1, 12))
@examples(max_examples=150, deadline=None)
def test_as_many_are_proposed_as_gain_most_and_none_below_the_margin(cost, run, rights, most):
    gain = Gain(cost)
    gain.balance = 100.0
    for right in rights:
        gain.saw(run, right)

    def expected(k):
        likely = [math.prod(gain.chance(run + j) for j in range(i + 1)) for i in range(k)]
        return (1 + sum(likely)) / (1 + cost * k)

    best = max(range(most + 1), key=expected)
    assert gain.count(run, most) == (best if expected(best) > 1 + MARGIN else 0)


def test_what_was_only_thought_of_teaches_too():
    gain, repeats = Gain(0.3), Repeats()
    before = gain.chance(1)
    for new in range(100, 400):  # a pair that comes again, but never what followed it
        gain.follow(repeats, [1, 2, new])
    assert gain.chance(2) < 0.1 < before
    assert gain.count(2, 7) == 0


def test_the_gain_measures_what_width_costs():
    gain = Gain(0.25)
    for i in range(20):
        k = 4 if i % 2 else 0
        gain.enter(k, 0, 0.010 * (1 + 0.5 * k))
    assert gain.cost == pytest.approx(0.5, rel=0.01)  # but for what one plain pass forgives
    gain.cost = 5.0
    assert gain.count(30, 7) == 0
    for _ in range(3000):
        gain.enter(0, 0, 0.010)
    assert gain.count(30, 7) > 0  # it tries again, now and then


def test_a_repeating_text_takes_fewer_passes(monkeypatch):
    # What proposals may cost is reckoned from the time passes take: here all take the same, whatever else runs.
    ticks = itertools.count()
    monkeypatch.setattr(assisted, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))

    class Parrot(torch.nn.Module):
        """Stands before the model: the next token is the one six places back."""

        def __call__(self, ids, scores):
            return torch.full_like(scores, -50.0).scatter(1, ids[:, -6:-5], 50.0)

    passes = []
    hook = model().register_forward_pre_hook(lambda m, a, k: passes.append(k["input_ids"].shape[1]), with_kwargs=True)
    try:
        given = settings("lookup", max_new_tokens=60, eos_token_id=None, prompt_lookup_num_tokens=10)
        out = model().generate(torch.tensor(rows(12)), logits_processor=[Parrot()], **given)
    finally:
        hook.remove()
    assert out[0, 12:].tolist() == (out[0, 6:12].tolist() * 10)
    assert len(passes) < 35


@pytest.mark.parametrize("given", [False, True])
def test_noise_drawn_for_tokens_that_do_not_come_is_drawn_again(given):
    generator = torch.Generator().manual_seed(1) if given else None
    like = torch.zeros(1, 7)
    torch.manual_seed(1)
    plain = Exponential(generator)
    states, expected = [], []
    for _ in range(12):
        states.append(plain.state(like))
        expected.append(plain(like))
    torch.manual_seed(1)
    if given:
        generator.manual_seed(1)
    noise, at = Rewound(Exponential(generator)), 0
    for asked, used in ((3, 1), (4, 4), (2, 1), (5, 3)):
        assert torch.equal(noise(torch.zeros(asked, 7)), torch.cat(expected[at : at + asked]))
        noise.keep(used)
        at += used
    assert torch.equal(plain.state(like), states[at])
