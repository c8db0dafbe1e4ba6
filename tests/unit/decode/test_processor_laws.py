"""Laws of processors: padding, beams, devices, errors."""

import random

import pytest
import torch

import gemmakit
from gemmakit import GenerationConfig
from gemmakit.errors import GenerationConfigError, InputError, NumericalError, TokenOutOfRange
from gemmakit.pytorch.decode import processors
from gemmakit.pytorch.decode.processors.guidance import Guidance
from gemmakit.pytorch.decode.prompt import Prompt

V = 90
NEW = dict(max_new_tokens=8, eos_token_id=None, pad_token_id=0)
SHAPING = [
    {"repetition_penalty": 1.8},
    {"encoder_repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 2},
    {"sequence_bias": {(0,): 1.0, (0, 2): 50.0, (0, 0, 2, 5): 50.0, (7, 8): 40.0}},
    {"bad_words_ids": [[0, 2], [5, 9], [11]]},
    {"min_new_tokens": 4},
    {"exponential_decay_length_penalty": (2, 1.5)},
    {"suppress_tokens": [3, 4, 5]},
    {"begin_suppress_tokens": [6, 7, 8]},
    {"forced_eos_token_id": 1},
    {"watermarking_config": {"bias": 5.0}},
    {"watermarking_config": {"ngram_len": 3, "keys": [5, 6, 7]}},
    {"guidance_scale": 1.5},
]

# Those between the caller's own and the watermark, at values that do something.
SAMPLED = dict(temperature=0.7, top_h=0.5, top_k=5, top_p=0.5, min_p=0.3, typical_p=0.5, epsilon_cutoff=0.02,
               eta_cutoff=0.02)  # fmt: skip


def context(**settings):
    more = {
        k: settings.pop(k)
        for k in ("prompt", "padding", "total", "prefix_allowed_tokens_fn", "custom")
        if k in settings
    }
    ids, padding = more.pop("prompt", torch.full((1, 1), 2)), more.pop("padding", None)
    prompt = Prompt(ids, embeds=None, mask=None if padding is None else ~padding, cache=None, past=0)
    return processors.Context(GenerationConfig(**settings), prompt, more.pop("total", V), V, **more)


def rows(*lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    out = [torch.randint(5, V, (n,), generator=generator) for n in lengths]
    for row in out:
        row[0] = 2
        row[-1] = row[1] if len(row) > 2 else row[-1]
    return out


def padded(rows, width):
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


@pytest.mark.parametrize("settings", SHAPING, ids=lambda s: "-".join(s))
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padding_never_counts_as_seen(small_model, settings, beams):
    texts = rows(3, 9, 6)
    ids, mask = padded(texts, 12)
    settings = {**NEW, "num_beams": beams, "eos_token_id": 1, **settings}
    out = small_model.generate(ids, attention_mask=mask, **settings)
    for row, text in zip(out, texts, strict=True):
        alone = small_model.generate(text[None], attention_mask=torch.ones_like(text)[None], **settings)[0]
        assert row[12:].tolist()[: len(alone) - len(text)] == alone[len(text) :].tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ngrams_are_forbidden_as_a_person_would(size):
    rng = random.Random(size)
    for _ in range(50):
        ids = torch.tensor([[rng.randrange(4) for _ in range(rng.randint(1, 12))] for _ in range(1)])
        row = ids[0].tolist()
        said = {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}
        banned = {t for t in range(6) if (*row[len(row) - size + 1 :], t) in said and len(row) >= size - 1}
        scores = processors.NoRepeatNgram(size, None)(ids, torch.zeros(1, 6))
        assert set(scores[0].isneginf().nonzero().flatten().tolist()) == banned


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"])
def test_truncation_leaves_a_beam_one_token_beside_every_eos(name):
    harsh = {"top_k": 1, "top_p": 0.01, "min_p": 1.0, "typical_p": 0.01, "epsilon_cutoff": 0.99, "eta_cutoff": 0.99}
    scores = torch.randn(3, V) * 40
    for eos, beams, left in (([1, 5], 2, 3), (None, 2, 2), ([1, 5], 1, 1)):
        settings = {"do_sample": True, "top_k": 0, "eos_token_id": eos, "num_beams": beams, name: harsh[name]}
        (processor,) = processors.build(context(**settings))
        assert ((processor(torch.tensor([[2]] * 3), scores) > -torch.inf).sum(-1) == left).all()


@pytest.mark.parametrize("name", SAMPLED)
def test_what_shapes_sampling_alone_reads_scores_alone(name):
    """So it can be recorded with a step, and equal rows of a batch share it."""
    asked = {"do_sample": True, "top_k": 0, name: SAMPLED[name]}
    order = list(processors.PROCESSORS)
    assert set(SAMPLED) == set(order[order.index("custom") + 1 : order.index("watermarking_config")])
    (processor,), (again,) = (processors.build(context(**asked)) for _ in range(2))
    assert isinstance(processor, processors.ScoresOnly) and processor == again
    scores = torch.randn(3, V)
    changed = processor(torch.tensor([[2]] * 3), scores)
    assert not torch.equal(changed, scores)
    assert torch.equal(processor(torch.randint(V, (3, 7)), scores), changed)
    for row in range(3):
        torch.testing.assert_close(processor(torch.tensor([[2]]), scores[row : row + 1])[0], changed[row])


WAITS = {"prefix_allowed_tokens_fn", "watermarking_config", "constraint"}


def test_no_processor_waits_for_the_device(monkeypatch):
    settings = {k: v for s in SHAPING for k, v in s.items() if k not in WAITS | {"guidance_scale"}}
    settings |= dict(do_sample=True, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, top_h=0.9, typical_p=0.9,
                     epsilon_cutoff=1e-4, eta_cutoff=1e-4, repetition_penalty=1.2, eos_token_id=[1, 9],
                     remove_invalid_values=True, renormalize_logits=True, forced_bos_token_id=8)  # fmt: skip
    ids, mask = padded(rows(3, 9), 12)
    chain = processors.build(context(**settings, prompt=ids, padding=mask == 0, total=30))
    # min_length gives way to min_new_tokens, whose kind it is.
    assert len(chain) == len(processors.PROCESSORS) - len(WAITS | {"guidance_scale", "custom", "min_length"})
    chain.append(processors.build(context(watermarking_config={"ngram_len": 3, "keys": [5]}, prompt=ids))[0])

    def waiting(*_, **__):
        raise AssertionError("the host waits for a value here")

    for method in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, waiting)
    scores = torch.randn(2, V)
    for processor in chain:
        scores = processor(ids, scores)


def test_everything_stays_on_its_device():
    """On torch's meta device, where a tensor of the CPU does not mix in."""
    settings = {k: v for s in SHAPING for k, v in s.items() if k not in WAITS | {"guidance_scale"}}
    settings |= dict(do_sample=True, top_p=0.9, min_p=0.01, top_h=0.9, typical_p=0.9, eta_cutoff=1e-4, num_beams=2)
    ids, mask = padded(rows(3, 9), 12)
    built = context(**settings, eos_token_id=[1, 9], prompt=ids.to("meta"), padding=(mask == 0).to("meta"), total=13)
    chain = processors.build(built)
    scores = torch.randn(4, V, device="meta")
    for processor in chain:
        scores = processor(ids.repeat_interleave(2, dim=0).to("meta"), scores)
        assert scores.device.type == "meta"


def test_nothing_is_built_for_defaults():
    assert processors.build(context(eos_token_id=1)) == []
    assert [type(p).__name__ for p in processors.build(context(do_sample=True))] == ["TopK"]


def test_custom_processors_run_after_the_shaping_ones_and_before_the_truncating_ones(small_model):
    seen = []

    def mine(ids, scores):
        seen.append(bool(scores[0, 7].isneginf()) and not scores.isneginf().all())
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([33, 34, 35]), 0.0)

    out = small_model.generate(
        rows(4)[0][None], logits_processor=gemmakit.LogitsProcessorList([mine]), suppress_tokens=[7], do_sample=True,
        top_k=1, **NEW,
    )  # fmt: skip
    assert all(seen)
    assert set(out[0, 4:].tolist()) <= {33, 34, 35}


def test_a_class_of_ones_own(small_model):
    class Only(gemmakit.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([44]), 0.0)

    class Third(gemmakit.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 7)

    out = small_model.generate(
        rows(4)[0][None], logits_processor=[Only()], stopping_criteria=gemmakit.StoppingCriteriaList([Third()]), **NEW
    )
    assert out[0, 4:].tolist() == [44, 44, 44]
    with pytest.raises(NotImplementedError, match="LogitsProcessor"):
        gemmakit.LogitsProcessor()(out, torch.zeros(1, V))
    either = gemmakit.StoppingCriteriaList([Third(), lambda ids, scores: ids[:, -1] == 2])
    assert either(torch.tensor([[1, 2], [2, 1]]), torch.zeros(2, V)).tolist() == [True, False]


def test_everything_forbidden_is_an_error_not_a_token(small_model):
    for sample in (False, True):
        with pytest.raises(NumericalError, match="step 1"):
            small_model.generate(rows(4)[0][None], suppress_tokens=list(range(V)), do_sample=sample, **NEW)


def test_prefix_function_faults_are_named(small_model):
    with pytest.raises(InputError, match=r"prompt 0 after 4 tokens"):
        small_model.generate(rows(4)[0][None], prefix_allowed_tokens_fn=lambda row, ids: [], **NEW)
    with pytest.raises(TokenOutOfRange, match=r"\b90\b.*\b90\b"):
        small_model.generate(rows(4)[0][None], prefix_allowed_tokens_fn=lambda row, ids: [3, 90], **NEW)


def test_token_ids_are_checked_against_the_vocabulary_in_generate(small_model):
    with pytest.raises(TokenOutOfRange, match=r"bad_words_ids.*\b200\b.*\b90\b"):
        small_model.generate(rows(4)[0][None], bad_words_ids=[[200]], **NEW)


# -- guidance --------------------------------------------------------------------------------------------------------


def guidance(model, negative, length, mask=None, cached=True):
    return Guidance(1.7, model, negative, mask, length, cached)


def test_guidance_takes_tokens_back_when_a_draft_is_refused(small_model):
    prompt, negative = rows(5, seed=1)[0][None], rows(4, seed=2)[0][None]
    kept = guidance(small_model, negative, 5)
    scores = torch.randn(1, V)
    text = torch.cat((prompt, torch.tensor([[20, 21, 22, 23, 24, 25]])), dim=1)
    other = torch.cat((text[:, :8], torch.tensor([[60, 61, 62]])), dim=1)
    for ids in (
        text[:, :5],
        text[:, :6],
        text[:, :7],
        text[:, :9],
        text,
        other[:, :9],
        other[:, :10],
        other,
        text[:, :5],
    ):
        fresh = guidance(small_model, negative, 5, cached=False)
        torch.testing.assert_close(kept(ids, scores), fresh(ids, scores), rtol=1e-5, atol=1e-5)


def test_a_padded_negative_prompt_is_the_negative_prompt(small_model):
    prompt, negative = rows(5, seed=1)[0][None], rows(4, seed=2)[0][None]
    ids, mask = padded([negative[0]], 9)
    ask = dict(guidance_scale=2.0, **NEW)
    plain = small_model.generate(prompt, negative_prompt_ids=negative, **ask)
    assert (
        plain.tolist()
        == small_model.generate(prompt, negative_prompt_ids=ids, negative_prompt_attention_mask=mask, **ask).tolist()
    )
    without = small_model.generate(prompt, **NEW)
    assert plain.tolist() != without.tolist()


def test_one_negative_prompt_serves_every_row(small_model):
    prompt, negative = torch.stack(rows(5, 5, 5, seed=1)), rows(4, seed=2)[0][None]
    ask = dict(guidance_scale=2.0, negative_prompt_ids=negative, **NEW)
    together = small_model.generate(prompt, **ask)
    assert together.tolist() == [small_model.generate(p[None], **ask)[0].tolist() for p in prompt]


def test_guidance_faults_are_named(small_model):
    prompt = torch.stack(rows(5, 5, 5, seed=1))
    with pytest.raises(InputError, match="2 rows and the batch 3"):
        small_model.generate(prompt, guidance_scale=2.0, negative_prompt_ids=prompt[:2], **NEW)
    with pytest.raises(InputError, match="guidance_scale"):
        small_model.generate(prompt, negative_prompt_ids=prompt, **NEW)
    with pytest.raises(InputError, match="negative_prompt_ids"):
        small_model.generate(inputs_embeds=small_model.get_input_embeddings()(prompt), guidance_scale=2.0, **NEW)
    with pytest.raises(TokenOutOfRange, match=r"\b90 ids"):
        small_model.generate(prompt, guidance_scale=2.0, negative_prompt_ids=prompt + 80, **NEW)


def test_prompt_settings_say_when_there_are_no_ids(small_model):
    embeds = torch.randn(1, 4, 32)
    for name, value in (("encoder_repetition_penalty", 2.0), ("encoder_no_repeat_ngram_size", 2)):
        with pytest.warns(UserWarning, match=name):
            small_model.generate(inputs_embeds=embeds, **{name: value}, **NEW)


def test_lengths_count_embeddings_as_prompt(small_model):
    """As ids or as embeddings, min_length means the same text."""
    prompt = rows(6)[0][None]
    embeds = small_model.get_input_embeddings()(prompt)
    first = int(small_model.generate(prompt, **NEW)[0, 6])
    ask = {**NEW, "eos_token_id": first, "min_length": 9, "max_new_tokens": 5}
    with_ids = small_model.generate(prompt, **ask)[0, 6:].tolist()
    assert first not in with_ids[:3]
    assert small_model.generate(inputs_embeds=embeds, **ask)[0].tolist() == with_ids
    for name, value in (("repetition_penalty", 1.5), ("no_repeat_ngram_size", 2)):
        with pytest.warns(UserWarning, match=name):
            small_model.generate(inputs_embeds=embeds, **{name: value}, **NEW)


def test_contradictions_are_refused_by_generate(small_model):
    with pytest.raises(GenerationConfigError, match=r"regex and grammar|json_schema"):
        small_model.generate(rows(4)[0][None], regex="a", grammar="start: /a/", **NEW)
