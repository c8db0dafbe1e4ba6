"""The caller's default dtype and device are his own: no token, score or mark of generate() depends on them."""

import contextlib

import pytest
import torch
from strategy_models import ALL, left_padded, model, rows, settings

import gemmakit

SHAPED = {
    "biased": dict(sequence_bias={(12,): 0.3, (12, 13): 0.7}, bad_words_ids=[[11], [14, 15]]),
    "penalised": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, exponential_decay_length_penalty=(2, 1.1)),
    "forced": dict(suppress_tokens=[13], begin_suppress_tokens=[12], forced_eos_token_id=7, min_new_tokens=2),
    "truncated": dict(do_sample=True, seed=3, temperature=0.7, top_p=0.9, min_p=0.01, typical_p=0.9, top_h=0.9),
    "guided": dict(guidance_scale=1.5),
    "marked": dict(watermarking_config={"bias": 2.0}),
    "marked_by_itself": dict(watermarking_config={"bias": 2.0, "seeding_scheme": "selfhash"}),
    "marked_in_turn": dict(watermarking_config={"keys": [3, 5, 7], "ngram_len": 3}, do_sample=True, seed=3),
    "offloaded": dict(cache_implementation="offloaded"),
    "offloaded_static": dict(cache_implementation="offloaded_static"),
    "quantized": dict(cache_implementation="quantized"),
}
DEFAULTS = [torch.float16, torch.bfloat16, torch.float64, torch.device("meta")]


@contextlib.contextmanager
def default(value):
    """Whatever is made without a dtype is rounded, or without a device cannot be read."""
    kept = torch.get_default_dtype()
    torch.set_default_device(value) if isinstance(value, torch.device) else torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(kept)


def outcome(ids, mask, asked):
    out = model().generate(ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **asked)
    return out.sequences, torch.stack(out.scores)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", DEFAULTS, ids=str)
@pytest.mark.parametrize("name", [*ALL, *SHAPED])
def test_no_token_and_no_score_depends_on_them(name, value):
    asked = settings(name) if name in ALL else settings("greedy", **SHAPED[name])
    many = not ("assistant_model" in asked or "prompt_lookup_num_tokens" in asked)
    ids, mask = left_padded(rows(8, 5) if many else rows(8))
    plain = outcome(ids, mask, asked)
    with default(value):
        again = outcome(ids, mask, asked)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("value", DEFAULTS, ids=str)
def test_batches_of_lists_do_not_depend_on_them(value):
    prompts = rows(8, 5)
    plain = model().generate_batch(prompts, max_new_tokens=6)
    with default(value):
        again = model().generate_batch(prompts, max_new_tokens=6)
    assert [r.ids for r in again] == [r.ids for r in plain]


@pytest.mark.parametrize("value", DEFAULTS, ids=str)
def test_marks_are_found_whatever_they_are(value):
    mark = gemmakit.WatermarkingConfig(bias=4.0)
    ids = model().generate(torch.tensor(rows(5)), max_new_tokens=40, eos_token_id=None, watermarking_config=mark)
    detector = gemmakit.WatermarkDetector(model().config, "cpu", mark)
    plain = detector(ids, return_dict=True)
    with default(value):
        again = gemmakit.WatermarkDetector(model().config, "cpu", mark)(ids, return_dict=True)
    assert again.z_score.tolist() == plain.z_score.tolist()
