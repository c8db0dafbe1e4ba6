"""Drafts do not change the distribution, and looking tokens up does not cost time."""

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

from gemmakit.pytorch.decode.sampling import NO_TOKEN, Exponential
from gemmakit.pytorch.decode.strategies import assisted
from gemmakit.pytorch.decode.strategies.assisted import speculative
from gemmakit.pytorch.decode.strategies.prompt_lookup import LOSS, HeldNoise, Ledger, Ngrams

pytestmark = pytest.mark.filterwarnings("ignore")


def chi_square(counts, probabilities):
    """How many standard deviations the chi-square statistic is above its mean (Wilson and Hilferty's approximation)."""
    n, kept = sum(counts), [i for i, p in enumerate(probabilities) if p * sum(counts) >= 5]
    pooled = [(counts[i], probabilities[i]) for i in kept]
    rest = n - sum(c for c, _ in pooled), 1 - sum(p for _, p in pooled)
    if rest[1] * n >= 5:
        pooled.append(rest)
    statistic = sum((c - n * p) ** 2 / (n * p) for c, p in pooled)
    freedom = len(pooled) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("apart", [0.0, 0.5, 3.0])
def test_speculative_sampling_gives_the_models_distribution(apart):
    """Each kept token, and the one after them, is distributed as p says, whatever q is (arXiv:2211.17192, A.1)."""
    V, k, runs = 5, 3, 6000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(k + 1, V, generator=generator)
    q = (scores[:k] + apart * torch.randn(k, V, generator=generator)).softmax(-1)
    noise = Exponential(generator)
    counts, kept = torch.zeros(k + 1, V), 0
    for _ in range(runs):
        drafted = (q / noise(q)).argmax(-1)
        tokens, n = speculative(scores, drafted, q, noise)
        for i in range(int(n) + 1):
            counts[i, tokens[i]] += 1
        kept += int(n)
    for i, p in enumerate(scores.softmax(-1).tolist()):
        assert chi_square(counts[i].tolist(), p) < 4
    assert kept == 3 * runs if apart == 0 else 0 < kept < 3 * runs


def test_a_draft_of_nan_and_a_token_the_draft_could_not_draw_change_nothing():
    scores = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    noise = Exponential(torch.Generator().manual_seed(1))
    drawn = torch.zeros(3)
    for _ in range(3000):
        tokens, n = speculative(scores, torch.tensor([0]), torch.zeros(1, 3), noise)
        assert n == 0
        drawn[tokens[0]] += 1
    assert chi_square(drawn.tolist(), scores[0].softmax(-1).tolist()) < 4


def test_scores_of_nan_give_no_token():
    scores = torch.full((3, 4), torch.nan)
    tokens, n = speculative(scores, torch.tensor([1, 2]), torch.full((2, 4), 0.25), Exponential(None))
    assert n == 0
    assert tokens[0] == NO_TOKEN


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("warped", [{}, dict(temperature=0.7, top_k=4)])
def test_assisted_sampling_is_distributed_as_plain_sampling(warped, threshold):
    """The second and third token, with the draft model right in the path; 8 tokens and what precedes them is given."""
    target, helper = model(seed=2, spread=0.4, vocab=8, layers=1), model(seed=3, spread=0.4, vocab=8, layers=1)
    ids = torch.tensor([[BOS, 5, 3]])
    given = {"max_new_tokens": 3, "do_sample": True, "eos_token_id": None, "pad_token_id": 0, "top_k": 0, **warped}
    runs, seen = 500, torch.zeros(8, 8, 8)
    torch.manual_seed(5)
    for _ in range(runs):
        out = target.generate(
            ids, assistant_model=helper, num_assistant_tokens=2, assistant_confidence_threshold=threshold, **given
        )
        seen[tuple(out[0, 3:].tolist())] += 1
    plain = target.generate(ids, return_dict_in_generate=True, output_scores=True, **given)
    first = plain.scores[0][0].softmax(-1)
    assert chi_square(seen.sum((1, 2)).tolist(), first.tolist()) < 4
    joint = torch.zeros(8, 8)
    for token in range(8):
        after = target.generate(
            torch.cat((ids, torch.tensor([[token]])), 1), return_dict_in_generate=True, output_scores=True, **given
        )
        joint[token] = first[token] * after.scores[0][0].softmax(-1)
    assert chi_square(seen.sum(2).flatten().tolist(), joint.flatten().tolist()) < 4


def test_the_schedule_follows_what_was_right():
    from gemmakit.pytorch.decode.strategies.assisted import DraftModel

    drafter = SimpleNamespace(count=5, fixed=False)
    for proposed, accepted, then in ((5, 5, 7), (7, 3, 6), (6, 0, 5), (0, 0, 5)):
        DraftModel.learn(drafter, proposed, accepted, 0.0)
        assert drafter.count == then
    drafter.fixed = True
    DraftModel.learn(drafter, 5, 5, 0.0)
    assert drafter.count == 5


def test_the_assistants_own_settings_count_where_the_call_says_nothing():
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


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 8))
@examples(max_examples=150, deadline=None)
def test_what_is_looked_up_followed_the_longest_known_run(tokens, longest, count):
    ngrams = Ngrams(longest)
    for token in tokens:
        ngrams.extend([token])
    found = ngrams.continuation(count)
    n = len(tokens)
    best = max(
        (s for s in range(1, longest + 1) if s < n for e in range(s, n) if tokens[e - s : e] == tokens[n - s :]),
        default=0,
    )
    if not best:
        assert found == []
        return
    places = [e for e in range(best, n) if tokens[e - best : e] == tokens[n - best :]]
    text = list(tokens)
    for _ in range(count):
        text.append(text[places[-1] + len(text) - n])
    assert found == text[n:]


@given(
    st.floats(0.01, 1.0), st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 12), st.integers(0, 2**31)
)
@examples(max_examples=150, deadline=None)
def test_bad_proposals_never_lose_more_than_the_share_allowed(cost, quality, most, seed):
    """In passes over one token; quality: the chance that a proposed token is right, changing over the text."""
    ledger, chance = Ledger(torch.device("cpu")), random.Random(seed)
    ledger.cost = cost
    spent = decided = 0.0
    for step in range(300):
        k = min(most, ledger.affordable())
        right = 0
        while right < k and chance.random() < quality[step % len(quality)]:
            right += 1
        ledger.enter(k, right)
        spent += 1 + cost * k
        decided += right + 1
        assert spent <= (1 + LOSS) * decided + 1e-6


def test_the_ledger_measures_what_width_costs():
    ledger = Ledger(torch.device("cpu"))
    for i in range(20):
        k = 4 if i % 2 else 0
        ledger.enter(k, 0, 0.010 * (1 + 0.5 * k))
    assert ledger.cost == pytest.approx(0.5)
    assert ledger.affordable() == 0
    for _ in range(600):
        ledger.enter(0, 0, 0.010)
    assert ledger.affordable() > 0  # it tries again, now and then


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


def test_noise_drawn_for_tokens_not_reached_serves_the_next_ones():
    plain, held = (Exponential(torch.Generator().manual_seed(1)) for _ in range(2))
    like = torch.zeros(1, 7)
    expected = [plain(like) for _ in range(9)]
    noise, at = HeldNoise(held), 0
    for asked, used in ((3, 1), (4, 4), (2, 1), (3, 3)):
        assert torch.equal(noise(torch.zeros(asked, 7)), torch.cat(expected[at : at + asked]))
        noise.drop(used)
        at += used
