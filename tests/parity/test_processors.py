"""Each processor, and chains of them, against transformers' at every step of a decode."""

import itertools

import pytest
import torch
import transformers

from gemmakit import GenerationConfig
from gemmakit.pytorch.decode import processors
from gemmakit.pytorch.decode.prompt import Prompt

V, EOS = 43, (1, 5)
STEPS = 12

SINGLES = [
    {"sequence_bias": {(7,): 2.5, (8, 9): 3.0, (3, 4, 5): -1.5, (11, 9): 1.0}},
    {"encoder_repetition_penalty": 1.7},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [[4], [1], [7, 8], [3, 2, 6]]},
    {"min_length": 9},
    {"min_new_tokens": 4},
    {"forced_eos_token_id": 5},
    {"forced_eos_token_id": [1, 5]},
    {"exponential_decay_length_penalty": (2, 1.3)},
    {"suppress_tokens": [0, 3, 36]},
    {"begin_suppress_tokens": [1, 2, 3]},
    {"remove_invalid_values": True},
    {"renormalize_logits": True},
    {"watermarking_config": {"greenlist_ratio": 0.4, "bias": 1.5}},
    {"watermarking_config": {"seeding_scheme": "selfhash", "context_width": 1}},
    {"watermarking_config": {"seeding_scheme": "selfhash", "context_width": 3}},
]
SAMPLING = [
    {"temperature": 0.6},
    {"temperature": 1.9},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 500},
    {"top_p": 0.0},
    {"top_p": 0.55},
    {"top_p": 0.99},
    {"min_p": 0.2},
    {"top_h": 0.4},
    {"top_h": 0.9},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"epsilon_cutoff": 0.03},
    {"eta_cutoff": 0.05},
]
CHAINS = [
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[3], [6, 7]], "min_new_tokens": 3},
    {"sequence_bias": {(2,): 4.0, (2, 2): -9.0}, "suppress_tokens": [9], "renormalize_logits": True},
    {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.8, "min_p": 0.02, "renormalize_logits": True},
    {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 0.001, "eta_cutoff": 0.01, "repetition_penalty": 1.2},
    {"do_sample": True, "top_k": 2, "top_p": 0.1, "min_p": 0.9, "num_beams": 3},
    {"do_sample": True, "typical_p": 0.2, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "num_beams": 2},
]
CASES = SINGLES + [{"do_sample": True, "top_k": 0, **s} for s in SAMPLING] + CHAINS


@pytest.fixture(scope="module")
def oracle():
    config = transformers.GemmaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.GemmaForCausalLM(config)


def theirs(oracle, settings, prompt, total, mask=None, **more):
    settings = dict(settings)
    if isinstance(settings.get("watermarking_config"), dict) and "keys" in settings["watermarking_config"]:
        settings["watermarking_config"] = transformers.SynthIDTextWatermarkingConfig(**settings["watermarking_config"])
    config = transformers.GenerationConfig(**settings, eos_token_id=list(EOS), max_length=total)
    config._eos_token_tensor = torch.tensor(EOS)
    kwargs = {} if mask is None else {"attention_mask": mask}
    return oracle._get_logits_processor(config, prompt.shape[1], prompt, device="cpu", model_kwargs=kwargs, **more)


def ours(settings, prompt, total, mask=None, **more):
    config = GenerationConfig(**settings, eos_token_id=list(EOS))
    start = Prompt(prompt, embeds=None, mask=None if mask is None else mask != 0, cache=None, past=0)
    return processors.build(processors.Context(config, start, total, V, **more))


def run(chain, ids, scores):
    for processor in chain:
        scores = processor(ids, scores)
    return scores


def decode(settings, oracle, scale, prompt, mask=None, seed=0, **more):
    """Both chains over the same logits; yields (ids, ours, theirs) of every step."""
    generator = torch.Generator().manual_seed(seed)
    total = prompt.shape[1] + STEPS
    mine = ours(settings, prompt, total, mask, **more)
    other = theirs(oracle, settings, prompt, total, mask, **more)
    ids = prompt
    for _ in range(STEPS):
        logits = torch.randn(prompt.shape[0], V, generator=generator) * scale
        expected = other(ids, logits.clone())
        yield ids, run(mine, ids, logits.clone()), expected
        token = torch.multinomial(expected.softmax(-1).nan_to_num(1.0), 1, generator=generator)
        ids = torch.cat((ids, token), dim=1)


def same(mine, other):
    """Equal but for rounding: log-sum-exp in another order moves the last bits."""
    torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("scale", [0.4, 6.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_scores_equal_at_every_step(oracle, settings, scale):
    prompt = torch.tensor([[2, 7, 8, 9, 7], [2, 3, 4, 3, 4], [2, 2, 2, 6, 7]])
    for _, mine, other in decode(settings, oracle, scale, prompt):
        same(mine, other)


PAIRS = [(a, b) for a, b in itertools.combinations(SINGLES[:18], 2) if not a.keys() & b.keys()]


@pytest.mark.parametrize("first", range(0, len(PAIRS), 12))
def test_pairs_equal_at_every_step(oracle, first):
    prompt = torch.tensor([[2, 7, 8, 9, 7], [2, 3, 4, 3, 4]])
    for a, b in PAIRS[first : first + 12]:
        if "forced_eos_token_id" in (a | b) and "bad_words_ids" in (a | b):
            continue
        for _, mine, other in decode(a | b, oracle, 2.0, prompt, seed=first):
            same(mine, other)


def test_one_token_prompt_forces_bos_and_starts_suppression_after_it(oracle):
    prompt = torch.tensor([[2], [2]])
    settings = {"forced_bos_token_id": 9, "begin_suppress_tokens": [1, 3]}
    for _, mine, other in decode(settings, oracle, 3.0, prompt):
        same(mine, other)


SYNTHID = [
    {"ngram_len": 5, "keys": [654, 400, 836, 123, 340]},
    {"ngram_len": 2, "keys": [9, 2**40, -7], "context_history_size": 3},
    {"ngram_len": 3, "keys": [1, 2], "skip_first_ngram_calls": True, "sampling_table_size": 101},
    {"ngram_len": 3, "keys": [4], "debug_mode": True, "sampling_table_seed": 3},
]


@pytest.mark.parametrize("settings", SYNTHID, ids=str)
@pytest.mark.parametrize("scale", [0.4, 6.0])
def test_synthid_scores_equal_but_that_forbidden_stays_forbidden(oracle, settings, scale):
    """A tournament ends in log 0 where transformers writes the smallest number instead.

    Compared as probabilities: each is a product of 1 - share, a float32 sum, so the log of a small one is all rounding.
    """
    prompt = torch.tensor([[2, 7, 8], [2, 3, 4]])
    for _, mine, other in decode(
        {"watermarking_config": settings, "do_sample": True, "top_k": 20}, oracle, scale, prompt
    ):
        torch.testing.assert_close(mine.exp(), other.exp(), rtol=1e-5, atol=1e-6)


def test_repetition_penalty_with_padding(oracle):
    prompt = torch.tensor([[0, 0, 2, 7, 8], [2, 3, 4, 3, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for _, mine, other in decode({"repetition_penalty": 1.5}, oracle, 3.0, prompt, mask):
        same(mine, other)


@pytest.mark.parametrize("beams", [1, 2])
def test_prefix_allowed_tokens(oracle, beams):
    """Words that are forbidden and all that is allowed: then the prefix decides, for all beams of a prompt at once."""
    asked = []

    def allowed(row, ids):
        asked.append(row)
        return [3, 4 + row] if ids[-1] != 3 else [5, 6, 7]

    prompt = torch.tensor([[2, 7]] * 4)
    settings = {"num_beams": beams, "bad_words_ids": [[3], [4], [7, 5]]}
    for _, mine, other in decode(settings, oracle, 3.0, prompt, prefix_allowed_tokens_fn=allowed):
        same(mine, other)
    assert set(asked) == set(range(4 // beams))


@pytest.mark.parametrize("scale", [0.1, 1.5, 3.0, 12.0])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999])
def test_nucleus_of_a_large_vocabulary(scale, p):
    """A CPU does not sort all of it; where sums of float32 end on p exactly, the last token of the set may differ."""
    scores = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(1)) * scale
    mine = processors.TopP(p, 2)(torch.zeros(3, 1, dtype=torch.long), scores)
    other = transformers.TopPLogitsWarper(p, min_tokens_to_keep=2)(None, scores)
    differing = mine != other
    assert differing.sum() <= 3
    assert scores.softmax(-1)[differing].sum() < 1e-4
    top = scores.topk(40).values[:, -1:]
    among = scores.masked_fill(scores < top, -torch.inf)
    assert torch.equal(
        processors.TopP(p)(torch.zeros(3, 1, dtype=torch.long), among), transformers.TopPLogitsWarper(p)(None, among)
    )


def test_invalid_values_are_removed(oracle):
    scores = torch.tensor([[0.0, float("nan"), float("inf"), float("-inf")] + [1.0] * (V - 4)])
    prompt = torch.tensor([[2, 7]])
    settings = {"remove_invalid_values": True}
    expected = theirs(oracle, settings, prompt, 9)(prompt, scores)
    assert torch.equal(run(ours(settings, prompt, 9), prompt, scores), expected)


def test_order_is_transformers(oracle):
    """All at once: any two in another order would differ somewhere."""
    settings = {
        **{k: v for s in SINGLES for k, v in s.items() if k not in ("watermarking_config", "forced_eos_token_id")},
        "watermarking_config": {"greenlist_ratio": 0.4, "bias": 1.5},
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.001, "typical_p": 0.97,
        "top_h": 0.97, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-3,
        "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 3,
    }  # fmt: skip
    prompt = torch.tensor([[2, 7, 8, 9, 7], [2, 3, 4, 3, 4]])
    for _, mine, other in decode(settings, oracle, 3.0, prompt):
        same(mine, other)
