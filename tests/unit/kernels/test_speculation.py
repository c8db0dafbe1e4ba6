"""Rows that propose tokens to themselves, as they do by default: nothing of what they give changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from seam_tools import native, quantized
from test_seams_of_the_family import model_of
from tiny_gemma import tiny

import gemmakit
from gemmakit.pytorch.cache import DynamicCache
from gemmakit.pytorch.decode import generate
from gemmakit.pytorch.decode import prompt as prompts
from gemmakit.pytorch.decode.drafts import Gain
from gemmakit.pytorch.decode.invariance import steps_alike
from gemmakit.pytorch.decode.strategies.prompt_lookup import speculation
from gemmakit.pytorch.kernels import cpu, rows_alike

pytestmark = [native, pytest.mark.filterwarnings("ignore")]
WEIGHTS = {"plain": None, "int8": (8, None), "int4-32": (4, 32)}
REPEATED = [2, *[7, 8, 9, 10, 11] * 5, 7, 8]


def member(name, weights="plain", dtype=torch.bfloat16):
    torch.manual_seed(1)
    sizes = dict(hidden_size=64, max_position_embeddings=256)
    model = tiny(**sizes) if name == "gemma" else model_of(name, **sizes)
    return (model if WEIGHTS[weights] is None else quantized(model, *WEIGHTS[weights])).to(dtype)


@pytest.fixture(autouse=True)
def eager_to_propose(monkeypatch):
    """Whatever it costs, and as if most of it were right: so that wrong proposals come often."""
    monkeypatch.setattr(Gain, "count", lambda self, run, most: min(most, run))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text", "vaultgemma", "gemma4_text"])
def test_a_pass_over_several_tokens_gives_the_bits_of_passes_over_one(name, weights):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, ids = member(name, weights, dtype), torch.randint(3, 120, (1, 44))
        with torch.no_grad():
            cache = DynamicCache()
            model(ids[:, :12], past_key_values=cache)
            assert steps_alike(model).why == ""
            with rows_alike():
                alone = torch.cat([model(one, past_key_values=cache).logits[0] for one in ids[:, 12:].split(1, 1)])
            for width in range(2, cpu.MAX_ROWS + 1):
                cache.crop(12)
                with rows_alike():
                    parts = [model(some, past_key_values=cache).logits[0] for some in ids[:, 12:].split(width, 1)]
                assert torch.equal(torch.cat(parts), alone), (dtype, width)


def told(model, ids, **asked):
    """All that a call shows, and how many passes it took."""
    passes = []
    forward = prompts.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "forward", lambda *given, **more: passes.append(1) or forward(*given, **more))
        events = model.stream(ids, output_scores=True, return_dict_in_generate=True, **asked)
        rows = [(e.token, e.text, e.finish_reason, e.scores) for e in events]
    return rows, len(passes)


def check_equal(model, ids, **asked):
    plain, steps = told(model, ids, speculate=False, **asked)
    found, fewer = told(model, ids, **asked)
    assert [row[:3] for row in found] == [row[:3] for row in plain]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(found, plain, strict=True))
    return steps, fewer


SETTINGS = {
    "greedy": {},
    "sampled": dict(do_sample=True, seed=3, temperature=1.5, top_k=0),
    "narrow": dict(do_sample=True, seed=4, temperature=0.2, top_p=0.9),
    "penalized": dict(repetition_penalty=1.3, no_repeat_ngram_size=6),
    "watermarked": dict(
        do_sample=True, seed=5, watermarking_config=gemmakit.SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3])
    ),
    "an eos among them": dict(eos_token_id=list(range(3, 40))),
    "a forced end": dict(forced_eos_token_id=5, eos_token_id=5),
    "no end before": dict(min_new_tokens=7, eos_token_id=[7, 8, 9]),
}


@pytest.mark.parametrize("count", [8, 9, 40])
@pytest.mark.parametrize("how", SETTINGS)
def test_tokens_scores_and_ends_are_those_of_single_steps(how, count):
    asked = {"eos_token_id": None, "pad_token_id": 0, **SETTINGS[how], "max_new_tokens": count}
    for name, weights in (("gemma", "plain"), ("gemma3_text", "int8")):
        check_equal(member(name, weights), torch.tensor([REPEATED]), **asked)


@given(
    st.lists(st.integers(3, 9), min_size=2, max_size=30),
    st.sampled_from(["gemma", "gemma2", "gemma3_text"]),
    st.integers(0, 9),
    st.sampled_from([{}, dict(do_sample=True, temperature=0.5)]),
)
@examples(max_examples=25, deadline=None)
def test_no_prompt_makes_a_difference(ids, name, seed, how):
    more = {**how, "seed": seed} if how else {}
    check_equal(member(name), torch.tensor([[2, *ids]]), max_new_tokens=30, eos_token_id=[4], pad_token_id=0, **more)


def test_a_text_that_repeats_takes_few_passes():
    model = member("gemma")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)  # it says again what it hears
    steps, fewer = check_equal(model, torch.tensor([REPEATED]), max_new_tokens=60, eos_token_id=None)
    assert steps == 60 and fewer < 30


@pytest.mark.parametrize("given", [False, True])
def test_what_draws_stands_afterwards_where_single_steps_leave_it(given):
    model, ids, states, texts = member("gemma"), torch.tensor([REPEATED]), [], []
    for speculate in (True, False):
        generator = torch.Generator() if given else torch.default_generator
        generator.manual_seed(7)
        more = dict(generator=generator) if given else {}
        asked = dict(do_sample=True, temperature=0.4, max_new_tokens=25, eos_token_id=None, speculate=speculate)
        texts.append(model.generate(ids, **asked, **more))
        states.append(generator.get_state())
    assert torch.equal(*texts) and torch.equal(*states)


def test_padding_windows_and_a_cache_that_goes_on_make_no_difference():
    model = member("gemma3_text")
    ids = torch.tensor([[0, 0, *REPEATED]])
    check_equal(model, ids, attention_mask=(ids > 0).long(), max_new_tokens=40, eos_token_id=None)
    texts = []
    for speculate in (True, False):
        cache, ids = DynamicCache(), torch.tensor([REPEATED])
        for turn in range(3):
            asked = dict(past_key_values=cache, max_new_tokens=20, eos_token_id=None, speculate=speculate)
            ids = torch.cat((model.generate(ids, **asked), torch.tensor([[7 + turn, 8]])), dim=1)
            assert cache.get_seq_length() == ids.shape[1] - 3
        texts.append(ids)
    assert torch.equal(*texts)


def decided(model, ids=(REPEATED,), **asked):
    made = generate.begin(model, torch.tensor(ids), **{"max_new_tokens": 20, "eos_token_id": None, **asked})
    return speculation(model, made.prompt, made.plan).why


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (dict(speculate=False), "speculate is False"),
        (dict(do_sample=True, num_return_sequences=2), "2 rows"),
        (dict(use_cache=False), "no cache"),
        (dict(cache_implementation="static"), "StaticCache"),
        (dict(output_attentions=True, return_dict_in_generate=True), "attentions"),
        (dict(max_new_tokens=4), "fewer than"),
        (dict(logits_processor=[lambda ids, scores: scores]), "function"),
        (dict(prefix_allowed_tokens_fn=lambda i, ids: [5]), "PrefixAllowedTokens"),
        (dict(guidance_scale=1.5), "Guidance"),
    ],
)
def test_what_cannot_be_asked_ahead_is_left_to_single_steps(asked, why):
    model = member("gemma")
    assert decided(model) == ""
    assert why in decided(model, **asked)


def test_a_model_whose_bits_may_depend_on_the_width_says_what_it_is():
    def after_a_pass(model):
        with torch.no_grad():
            model(torch.tensor([REPEATED]))
        return steps_alike(model).why

    model = member("gemma")
    assert after_a_pass(model) == ""
    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: None)
    assert "hook" in after_a_pass(model)
    hook.remove()
    assert after_a_pass(model) == ""
    model.register_forward_hook(lambda *_: None)
    assert "hook" in after_a_pass(model)
    assert "float64" in after_a_pass(member("gemma").double())
    eager = member("gemma")
    eager.config.attn_implementation = "eager"
    assert "attn_implementation" in after_a_pass(eager)
