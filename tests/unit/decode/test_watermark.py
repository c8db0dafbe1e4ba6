"""Watermarks are found where they are, not elsewhere, and leave the distribution as promised."""

import pytest
import torch

import gemmakit
from gemmakit import GemmaConfig, SynthIDTextWatermarkingConfig, WatermarkDetector, WatermarkingConfig
from gemmakit.errors import InputError
from gemmakit.pytorch.decode.processors import watermark

V = 400
KEYS = [654, 400, 836, 123, 340, 443, 597, 160, 57, 29]
GREEN = [
    WatermarkingConfig(bias=3.0),
    WatermarkingConfig(bias=3.0, greenlist_ratio=0.5, hashing_key=7),
    WatermarkingConfig(bias=3.0, seeding_scheme="selfhash"),
    WatermarkingConfig(bias=3.0, seeding_scheme="selfhash", context_width=3),
]
SYNTHID = SynthIDTextWatermarkingConfig(ngram_len=4, keys=KEYS)
CONFIG = GemmaConfig(vocab_size=V, num_hidden_layers=1)


def sampled(settings, rows=2, length=150, seed=0, flat=1.0):
    """Text of a model that thinks every token about as likely, drawn with the mark."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, 1), 2)
    mark = None if settings is None else watermark.processor(settings, V, 1)
    for _ in range(length):
        scores = torch.randn(rows, V, generator=generator) * flat
        scores = scores if mark is None else mark(ids, scores)
        ids = torch.cat((ids, torch.multinomial(scores.softmax(-1), 1, generator=generator)), dim=1)
    return ids


@pytest.mark.parametrize("settings", [*GREEN, SYNTHID], ids=lambda s: str(s)[:60])
def test_marked_text_is_found_and_other_text_is_not(settings):
    detector = WatermarkDetector(CONFIG, watermarking_config=settings)
    marked, plain = sampled(settings), sampled(None, seed=1)
    assert detector(marked).all()
    assert not detector(plain).any()
    other = type(settings)(
        **{**settings.to_dict(), **({"keys": [1, 2, 3]} if settings is SYNTHID else {"hashing_key": 99})}
    )
    assert not WatermarkDetector(CONFIG, watermarking_config=other)(marked).any()


@pytest.mark.parametrize("settings", [GREEN[0], SYNTHID], ids=["green", "synthid"])
def test_a_detectors_numbers_agree_with_each_other(settings):
    out = WatermarkDetector(CONFIG, watermarking_config=settings, ignore_repeated_ngrams=True)(
        sampled(settings), return_dict=True
    )
    assert (out.green_fraction == out.num_green_tokens / out.num_tokens_scored).all()
    assert (out.prediction == (out.z_score > 3)).all()
    assert ((out.p_value < 0.01) == (out.z_score > 2.3263)).all()
    assert (out.confidence == 1 - out.p_value).all()


def test_unmarked_text_has_the_expected_share():
    out = WatermarkDetector(CONFIG, watermarking_config=GREEN[0])(sampled(None, rows=8, length=250), return_dict=True)
    assert abs(out.z_score.mean()) < 1.5
    synthid = WatermarkDetector(CONFIG, watermarking_config=SYNTHID)(
        sampled(None, rows=8, length=250), return_dict=True
    )
    assert abs(synthid.z_score.mean()) < 1.5


def test_leading_bos_is_not_scored_and_must_be_uniform():
    detector = WatermarkDetector(CONFIG, watermarking_config=GREEN[0])
    ids = sampled(GREEN[0])
    assert detector(ids, return_dict=True).z_score.tolist() == detector(ids[:, 1:], return_dict=True).z_score.tolist()
    mixed = ids.clone()
    mixed[0, 0] = 9
    with pytest.raises(InputError, match="<bos>"):
        detector(mixed)
    with pytest.raises(InputError, match="needed"):
        detector(ids[:, :2])


def test_synthid_leaves_the_distribution_unchanged_on_average():
    """Over random keys, the mean of the tilted probabilities is the probability itself (non-distortion)."""
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    total = torch.zeros(1, 12)
    trials = 3000
    for i in range(trials):
        settings = SynthIDTextWatermarkingConfig(
            ngram_len=3, keys=[i * 7919 + 1, i * 104729 + 2], sampling_table_size=65536
        )
        total += _shared(settings)(torch.tensor([[2, 5, 6, 7]]), scores).softmax(-1)
    # The standard error of a mean of numbers within [0, 1] is below 0.5 / sqrt(trials); five of them.
    assert (total / trials - scores.softmax(-1)).abs().max() < 5 * 0.5 / trials**0.5


def _shared(settings):
    mark = watermark.SynthID(settings, 1)
    mark.tournament._table = torch.randint(
        0, 2, (65536,), generator=torch.Generator().manual_seed(settings.keys[0])
    ).float()
    return mark


def test_forbidden_tokens_stay_forbidden():
    scores = torch.randn(2, V)
    scores[:, 10:300] = -torch.inf
    for settings in (*GREEN, SYNTHID):
        out = watermark.processor(settings, V, 1)(torch.tensor([[2, 5, 6], [2, 7, 8]]), scores)
        assert out[:, 10:300].isneginf().all()
        assert out.amax(-1).isfinite().all()


def test_a_context_is_marked_once():
    mark = watermark.processor(SynthIDTextWatermarkingConfig(ngram_len=3, keys=KEYS), V, 1)
    scores = torch.randn(1, V)
    assert not torch.equal(mark(torch.tensor([[2, 5, 6, 9]]), scores), scores)
    assert torch.equal(mark(torch.tensor([[2, 5, 6, 9, 5, 6]]), scores), scores)


@pytest.mark.parametrize(
    "settings",
    [{"ngram_len": 3, "keys": KEYS}, {"bias": 6.0}, {"bias": 6.0, "seeding_scheme": "selfhash", "context_width": 6}],
    ids=str,
)
def test_padding_and_neighbours_do_not_change_a_mark(small_model, settings):
    row = torch.tensor([[2, 20, 30, 40]])
    ask = dict(watermarking_config=settings, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
    alone = small_model.generate(row, **ask)[0, 4:].tolist()
    ids = torch.tensor([[0, 0, 2, 20, 30, 40], [2, 9, 8, 7, 6, 5]])
    together = small_model.generate(ids, attention_mask=(ids != 0).long(), **ask)[0, 6:].tolist()
    assert together == alone


def test_settings_come_as_objects_or_dictionaries(small_model):
    ids, ask = torch.tensor([[2, 20, 30]]), dict(max_new_tokens=6, eos_token_id=None)
    for settings in (GREEN[0], SYNTHID):
        a = small_model.generate(ids, watermarking_config=settings, **ask)
        assert a.tolist() == small_model.generate(ids, watermarking_config=settings.to_dict(), **ask).tolist()
    assert gemmakit.WatermarkDetector is WatermarkDetector
