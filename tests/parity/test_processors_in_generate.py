"""generate() with processors against transformers': the same tokens, and the same distribution to draw from."""

import pytest
import torch
import transformers
from tiny_shapes import VOCAB

import gemmakit

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = dict(max_new_tokens=10, eos_token_id=[1, 9], pad_token_id=0)

GREEDY = [
    {"repetition_penalty": 1.6},
    {"encoder_repetition_penalty": 2.0},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[i] for i in range(20, 60)]},
    {"sequence_bias": {(11,): 9.0, (11, 12): 30.0, (12, 11): 30.0}},
    {"min_new_tokens": 9},
    {"min_length": 14},
    {"min_length": 15, "min_new_tokens": 2, "sequence_bias": {(9,): 40.0}},
    {"forced_eos_token_id": 9},
    {"exponential_decay_length_penalty": (3, 1.9)},
    {"suppress_tokens": list(range(40, 120))},
    {"begin_suppress_tokens": list(range(2, 150))},
    {"remove_invalid_values": True, "renormalize_logits": True},
    {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 4.0}},
    {"watermarking_config": {"seeding_scheme": "selfhash", "bias": 4.0, "context_width": 2}},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "suppress_tokens": [5, 6], "min_new_tokens": 4},
    {"guidance_scale": 1.7},
    {"guidance_scale": 0.5, "repetition_penalty": 1.3},
    {"guidance_scale": 2.0, "use_cache": False},
]
SAMPLING = [
    {"temperature": 0.7},
    {"temperature": 2.0, "top_k": 11},
    {"top_p": 0.7, "top_k": 0},
    {"min_p": 0.1, "top_k": 0},
    {"top_h": 0.5, "top_k": 0},
    {"typical_p": 0.6, "top_k": 0},
    {"epsilon_cutoff": 0.01, "top_k": 0},
    {"eta_cutoff": 0.05, "top_k": 0},
    {
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "renormalize_logits": True,
    },
    {"watermarking_config": {"bias": 2.0}, "top_k": 40},
]


@pytest.fixture(scope="module")
def both(pair):
    return pair("gqa")


def ids(rows=2, width=6, seed=5):
    out = torch.randint(10, VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))
    out[:, 0] = 2
    return out


def answers(both, prompt, **settings):
    """Both libraries' outputs; each takes a watermark's settings as its own class."""
    out = []
    for library, model in ((gemmakit, both.ours), (transformers, both.theirs)):
        own = dict(settings)
        if "watermarking_config" in own:
            own["watermarking_config"] = library.WatermarkingConfig(**own["watermarking_config"])
        common = {**dict(return_dict_in_generate=True, output_scores=True), **LENGTH}
        out.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **(common | own)))
    return out


def close(mine, other, tolerance=2e-4):
    """The two models' own float32 rounding lies between the scores."""
    torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def texts(sequences):
    """Each row up to its eos: a beam search of transformers fills the rest with eos where the pad token is 0."""
    return [row[: next((i + 1 for i, t in enumerate(row) if t in (1, 9)), None)] for row in sequences.tolist()]


@pytest.mark.parametrize("settings", GREEDY, ids=lambda s: "-".join(s))
def test_greedy_tokens_and_scores(both, settings):
    mine, other = answers(both, ids(), **settings)
    assert mine.sequences.tolist() == other.sequences.tolist()
    for a, b in zip(mine.scores, other.scores, strict=True):
        close(a, b)


@pytest.mark.parametrize("settings", [s for s in GREEDY if "guidance_scale" not in s], ids=lambda s: "-".join(s))
def test_beam_search_tokens(both, settings):
    mine, other = answers(both, ids(seed=8), num_beams=3, **settings)
    assert texts(mine.sequences) == texts(other.sequences)


@pytest.mark.parametrize("settings", SAMPLING, ids=lambda s: "-".join(s))
def test_the_distribution_drawn_from(both, settings):
    """Draw with ours, then ask transformers for the scores after each prefix of what was drawn."""
    prompt = ids(rows=3)
    mine = both.ours.generate(
        prompt, do_sample=True, seed=4, return_dict_in_generate=True, output_scores=True, **settings, **LENGTH
    )
    for step, scores in enumerate(mine.scores):
        so_far = mine.sequences[:, : prompt.shape[1] + step]
        going = ~torch.isin(so_far, torch.tensor(LENGTH["eos_token_id"])).any(-1)
        _, other = answers(both, so_far[going], do_sample=True, max_new_tokens=1, **settings)
        close(scores[going].softmax(-1), other.scores[0].softmax(-1))


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_guidance_by_a_negative_prompt(both, scale):
    negative = ids(width=4, seed=11)
    mine, other = answers(both, ids(), guidance_scale=scale, negative_prompt_ids=negative)
    assert mine.sequences.tolist() == other.sequences.tolist()
    for a, b in zip(mine.scores, other.scores, strict=True):
        close(a, b)


def test_guidance_with_beams_is_that_of_each_beam(both):
    """transformers keeps the negative prompt's cache while beams change places; ours computes what it should be."""
    settings = dict(guidance_scale=1.5, num_beams=3, **LENGTH)
    out = both.ours.generate(ids(), negative_prompt_ids=ids(width=4, seed=11), **settings, return_dict_in_generate=True,
                             output_scores=True)  # fmt: skip
    again = both.ours.generate(ids(), negative_prompt_ids=ids(width=4, seed=11), use_cache=False, **settings)
    assert out.sequences.tolist() == again.tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_prefix_allowed_tokens(both, beams):
    def allowed(row, so_far):
        return [20 + row, 30, 40, 50 + int(so_far[-1]) % 7, 9]

    mine, other = answers(both, ids(), num_beams=beams, prefix_allowed_tokens_fn=allowed)
    assert texts(mine.sequences) == texts(other.sequences)


def test_forced_bos_after_a_prompt_of_one_token(both):
    mine, other = answers(both, torch.tensor([[2]]), forced_bos_token_id=33, begin_suppress_tokens=[44, 45])
    assert mine.sequences[0, 1] == 33
    assert mine.sequences.tolist() == other.sequences.tolist()


def test_synthid_marks_the_same_tokens(both):
    """Greedy over the tilted scores of each step, as both libraries tilt them."""
    settings = {"ngram_len": 4, "keys": [3, 99, 12345]}
    mine, other = (
        model.generate(ids(), attention_mask=torch.ones_like(ids()), **LENGTH,
                       watermarking_config=library.SynthIDTextWatermarkingConfig(**settings))
        for library, model in ((gemmakit, both.ours), (transformers, both.theirs))
    )  # fmt: skip
    assert mine.tolist() == other.tolist()


def test_detectors_agree(both):
    prompt = ids(rows=1, width=4)
    for settings in ({"bias": 6.0, "greenlist_ratio": 0.3}, {"bias": 6.0, "seeding_scheme": "selfhash"}):
        marked = both.ours.generate(prompt, watermarking_config=settings, max_new_tokens=60, do_sample=True, seed=1)
        plain = both.ours.generate(prompt, max_new_tokens=60, do_sample=True, seed=1)
        for text in (marked, plain):
            for once in (False, True):
                mine = gemmakit.WatermarkDetector(both.ours.config, "cpu", settings, ignore_repeated_ngrams=once)
                other = transformers.WatermarkDetector(
                    both.theirs.config, "cpu", transformers.WatermarkingConfig(**settings), ignore_repeated_ngrams=once
                )
                a, b = mine(text, return_dict=True), other(text, return_dict=True)
                for field in ("num_tokens_scored", "num_green_tokens", "green_fraction", "z_score", "p_value"):
                    assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-9)
                assert (mine(text) == other(text)).all()
        assert gemmakit.WatermarkDetector(both.ours.config, watermarking_config=settings)(marked[:, 4:]).all()
