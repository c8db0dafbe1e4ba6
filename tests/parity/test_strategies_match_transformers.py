"""Every strategy token for token against transformers, over settings, processors, padding, caches and dtypes."""

import itertools

import pytest
import torch
from strategy_tools import FLAT, PEAKED, distance, models, prompt, run, tokens

pytestmark = pytest.mark.usefixtures("drafting")
# Sums in another order: differences of a few float32 roundings of logits of size 1 to 30.
CLOSE = 5e-4

PROCESSORS = {
    "none": {},
    "repetition": dict(repetition_penalty=1.3),
    "ngram": dict(no_repeat_ngram_size=2),
    "min_new": dict(min_new_tokens=4),
    "bad_words": dict(bad_words_ids=[[5], [7, 11], [20, 21, 22]]),
    "bias": dict(sequence_bias=[[[12], 2.0], [[12, 13], -3.0]]),
    "suppress": dict(suppress_tokens=[3, 4, 5, 6], begin_suppress_tokens=[10, 11]),
    "decay": dict(exponential_decay_length_penalty=(3, 1.4)),
    "forced": dict(forced_eos_token_id=1),
    "renormalized": dict(renormalize_logits=True, repetition_penalty=1.2),
}
ENDS = dict(eos_token_id=[1, 9], pad_token_id=0)


def same(settings, kind="padded", spread=PEAKED, seed=0, dtype=torch.float32, new=10, torch_seed=None, close=CLOSE):
    ours, theirs = models(spread, seed, dtype)
    ids, mask = prompt(kind, seed + 1)
    settings = {**ENDS, "max_new_tokens": new, **settings}
    a, b = (run(m, ids, mask, torch_seed, **settings) for m in (ours, theirs))
    assert tokens(a, ids.shape[1]) == tokens(b, ids.shape[1])
    assert distance(a.logits, b.logits) < close * 10
    assert distance(a.scores, b.scores) < close * 10
    if b.get("beam_indices") is not None:
        assert a.beam_indices.tolist() == b.beam_indices.tolist()
        assert distance([a.sequences_scores], [b.sequences_scores]) < close
    return a, b


@pytest.mark.parametrize("spread", [FLAT, PEAKED])
@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("kind", ["one", "even", "padded"])
def test_greedy(kind, processors, spread):
    same(PROCESSORS[processors], kind, spread)


@pytest.mark.parametrize("spread", [FLAT, PEAKED])
@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_with_processors(beams, processors, spread):
    same(dict(num_beams=beams, num_return_sequences=2, **PROCESSORS[processors]), spread=spread)


@pytest.mark.parametrize("spread", [FLAT, PEAKED])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("kind", ["one", "padded"])
def test_when_beams_stop(kind, early_stopping, length_penalty, spread):
    settings = dict(num_beams=3, early_stopping=early_stopping, length_penalty=length_penalty, num_return_sequences=3)
    for seed in range(3):
        same(settings, kind, spread, seed, new=14)


@pytest.mark.parametrize("ends", [dict(eos_token_id=1), dict(eos_token_id=[1, 9, 15, 16]), dict(eos_token_id=None)])
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_eos_lists(beams, ends):
    for spread, seed in itertools.product((FLAT, PEAKED), range(2)):
        same({"num_beams": beams, **ends}, spread=spread, seed=seed)


@pytest.mark.parametrize("cache", [dict(use_cache=False), dict(cache_implementation="static"), {}])
@pytest.mark.parametrize("strategy", [{}, dict(num_beams=3), dict(num_beams=4, do_sample=True, top_k=0)])
@pytest.mark.parametrize("kind", ["one", "padded"])
def test_caches(kind, strategy, cache):
    ours, theirs = models(PEAKED, 2)
    ids, mask = prompt(kind, 5)
    settings = {**ENDS, "max_new_tokens": 9, **strategy}
    a = run(ours, ids, mask, 3, **settings, **cache)
    b = run(theirs, ids, mask, 3, **settings)  # its static cache differs from its own dynamic one in nothing but speed
    assert tokens(a, ids.shape[1]) == tokens(b, ids.shape[1])


@pytest.mark.parametrize("spread", [FLAT, PEAKED])
@pytest.mark.parametrize(
    "warpers",
    [dict(top_k=0), dict(top_k=5), dict(top_k=0, top_p=0.7), dict(top_k=0, temperature=0.5), dict(min_p=0.1),
     dict(top_k=0, typical_p=0.8), dict(top_k=0, epsilon_cutoff=0.01), dict(top_k=0, eta_cutoff=0.02)],
    ids=lambda w: "-".join(w),
)  # fmt: skip
@pytest.mark.parametrize("strategy", [{}, dict(num_return_sequences=2), dict(num_beams=3, num_return_sequences=2)],
                         ids=["sample", "sample2", "beam_sample"])  # fmt: skip
def test_sampling_draws_the_same_tokens_from_the_same_generator(strategy, warpers, spread):
    same(dict(do_sample=True, **strategy, **warpers), spread=spread, torch_seed=7)


@pytest.mark.parametrize("strategy", [{}, dict(num_beams=3), dict(num_beams=2, do_sample=True)])
def test_double_precision(strategy):
    same(strategy, dtype=torch.float64, torch_seed=2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_at_near_ties_alone(dtype, seed):
    """Both round sums of another order to 8 or 11 bits; a token may differ where two logits are that close."""
    ours, theirs = models(PEAKED, seed, dtype)
    ids, mask = prompt("one", seed)
    a, b = (run(m, ids, mask, max_new_tokens=8, eos_token_id=None) for m in (ours, theirs))
    for x, y, u, v in zip(*(o.sequences[0, ids.shape[1] :] for o in (a, b)), a.scores, b.scores, strict=True):
        assert u.dtype == torch.float32
        near = 16 * torch.finfo(dtype).eps * u.abs().max()  # two layers of weights that amplify
        assert (u - v).abs().max() < near
        if x != y:
            assert u[0, x] - u[0, y] < 2 * near
            break


@pytest.mark.parametrize("strategy", [{}, dict(do_sample=True), dict(num_beams=3), dict(num_beams=2, do_sample=True)],
                         ids=["greedy", "sample", "beam", "beam_sample"])  # fmt: skip
@pytest.mark.parametrize("kind", ["one", "even", "padded"])
def test_attentions_and_hidden_states(kind, strategy):
    ours, theirs = models(PEAKED, 1)
    theirs.set_attn_implementation("eager")
    ids, mask = prompt(kind)
    wanted = dict(output_attentions=True, output_hidden_states=True)
    a, b = (run(m, ids, mask, 5, max_new_tokens=6, **ENDS, **strategy, **wanted) for m in (ours, theirs))
    assert list(a.keys()) == list(b.keys())
    assert tokens(a, ids.shape[1]) == tokens(b, ids.shape[1])
    for name in ("attentions", "hidden_states"):
        assert len(a[name]) == len(b[name])
        for step, (x, y) in enumerate(zip(a[name], b[name], strict=True)):
            x, y = ([_without_padding(t, mask) for t in v] for v in (x, y)) if not step else (x, y)
            assert distance(x, y) < CLOSE
    theirs.set_attn_implementation("sdpa")


def _without_padding(value, mask):
    """The prompt's padding computes nothing that means anything."""
    mask = mask.bool().repeat_interleave(len(value) // len(mask), dim=0)
    return value * mask[:, None, :, None] if value.dim() == 4 else value * mask[..., None]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_transition_scores(beams, normalize):
    ours, theirs = models(FLAT, 3)
    ids, mask = prompt("padded")
    for model in (ours, theirs):
        out = run(model, ids, mask, num_beams=beams, num_return_sequences=beams, max_new_tokens=8, **ENDS)
        indices = out.beam_indices if beams > 1 else None
        scores = ours.compute_transition_scores(out.sequences, out.scores, indices, normalize)
        assert (
            distance([scores], [theirs.compute_transition_scores(out.sequences, out.scores, indices, normalize)]) < 1e-5
        )
        if beams > 1 and not normalize and model is ours:
            lengths = (out.beam_indices >= 0).sum(-1)
            assert torch.allclose(scores.sum(-1) / lengths, out.sequences_scores, atol=1e-5)


@pytest.mark.parametrize("processors", ["none", "repetition", "ngram", "min_new", "forced"])
@pytest.mark.parametrize("drafts", ["model", "itself", "lookup"])
@pytest.mark.parametrize("seed", range(3))
def test_assisted_greedy(seed, drafts, processors):
    """Hidden states and attentions are left out: after a first draft transformers 5.23 takes them from places of the
    prompt; here they are those of plain decoding (tests/unit/decode)."""
    pairs = {"model": models(PEAKED, seed + 5), "itself": models(PEAKED, seed)}
    how = dict(prompt_lookup_num_tokens=4) if drafts == "lookup" else dict(assistant_model=pairs[drafts])
    ours, theirs = models(PEAKED, seed)
    ids, mask = prompt("one", seed)
    a, b = (
        run(m, ids, mask, **{**ENDS, "max_new_tokens": 16, **PROCESSORS[processors], **how}) for m in (ours, theirs)
    )
    assert a.sequences.tolist() == b.sequences.tolist()
    assert distance(a.scores, b.scores) < CLOSE * 10
    assert distance(a.logits, b.logits) < CLOSE * 10
