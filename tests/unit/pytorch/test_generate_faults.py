"""FAULTS rows 11 to 15: what generate() refuses, and what each refusal says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gemma import BOS, VOCAB, left_padded, prompts, tiny

import gemmakit
from gemmakit.errors import GenerationConfigError, InputError, NumericalError, PromptTooLong, TokenOutOfRange

MODEL = tiny()


# -- 11: numbers -----------------------------------------------------------------------------------------------------

WHOLE = {"max_length": 1, "max_new_tokens": 1, "min_length": 0, "min_new_tokens": 0, "top_k": 0, "seed": 0,
         "prefill_chunk_size": 1, "num_return_sequences": 1}  # fmt: skip
REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "max_time")
FLAGS = ("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
         "output_hidden_states")  # fmt: skip
no_number = st.one_of(st.text(max_size=4), st.lists(st.integers(), max_size=2), st.binary(max_size=3), st.booleans())
no_finite = st.sampled_from([math.nan, math.inf, -math.inf, -(10**400)])
BAD = st.one_of(
    st.tuples(st.sampled_from([*WHOLE]), st.one_of(st.floats(), no_number, st.integers(max_value=-1))),
    st.tuples(st.sampled_from([n for n, low in WHOLE.items() if low]), st.just(0)),
    st.tuples(st.sampled_from(REAL), st.one_of(no_finite, no_number, st.floats(max_value=-1e-300))),
    st.tuples(st.sampled_from(["temperature", "repetition_penalty", "max_time"]), st.sampled_from([0, 0.0, 10**400])),
    st.tuples(st.sampled_from(["top_p", "min_p"]), st.one_of(st.floats(min_value=1.0000001), st.just(10**400))),
    st.tuples(st.just("seed"), st.integers(min_value=2**63)),
    st.tuples(st.sampled_from(FLAGS), st.one_of(st.integers(), st.text(max_size=4), st.floats())),
)


@settings(deadline=None)
@given(bad=BAD)
def test_impossible_settings_are_refused_naming_field_value_and_range(bad):
    name, value = bad
    for call in (gemmakit.GenerationConfig, lambda **s: MODEL.generate(prompts(), **s)):
        with pytest.raises(GenerationConfigError) as refusal:
            call(**{name: value})
        message = str(refusal.value)
        assert message.startswith(f"{name} is {value!r}")
        assert "must be" in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(temperature=0.0), "temperature is 0.0.*>= 1e-10"),
        (dict(top_p=1.5), "top_p is 1.5.*>= 0.*<= 1"),
        (dict(max_new_tokens=0), "max_new_tokens is 0.*>= 1"),
        (dict(cache_implementation="magic"), "cache_implementation is 'magic'.*static"),
        (dict(stop_strings=[""]), "stop_strings holds ''"),
        (dict(stop_strings=[3]), "stop_strings holds 3"),
        (dict(pad_token_id="x"), "pad_token_id.*'x'.*whole number"),
        (dict(eos_token_id=1.5), r"eos_token_id.*1\.5.*whole number"),
        (dict(eos_token_id=[1, "a"]), "eos_token_id"),
        (dict(max_new_token=3), "max_new_token.*'max_new_tokens'"),
        (dict(no_such_setting=3), "no_such_setting"),
    ],
)
def test_refusals_say_the_range(setting, message):
    with pytest.raises(ValueError, match=message):
        MODEL.generate(prompts(), **setting)


def test_huge_counts_are_refused_before_anything_large_is_made():
    with pytest.raises(PromptTooLong, match="max_new_tokens is 1000000000000"):
        MODEL.generate(prompts(), max_new_tokens=10**12)
    assert MODEL.generate(prompts(), top_k=10**12, do_sample=True, max_new_tokens=1).shape == (2, 10)


# -- 12: token ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [VOCAB, -1, 2**40])
def test_prompt_ids_outside_the_vocabulary_are_named(bad):
    ids = prompts()
    ids[1, 3] = bad
    with pytest.raises(TokenOutOfRange, match=rf"{bad} .*vocabulary of {VOCAB}"):
        MODEL.generate(ids)


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id", "bos_token_id"])
@pytest.mark.parametrize("bad", [VOCAB, -2])
def test_special_ids_outside_the_vocabulary_are_named(name, bad):
    with pytest.raises(InputError, match=rf"{name}.*{bad}|{bad}.*{name}"):
        MODEL.generate(prompts(), **{name: bad})
    with pytest.raises(InputError, match=str(VOCAB)):
        MODEL.generate(prompts(), eos_token_id=[1, VOCAB])


@pytest.mark.parametrize("ids", [torch.zeros(2, 3), torch.tensor([1, 2]), torch.zeros(1, 2, 3, dtype=torch.long),
                                 torch.zeros(0, 4, dtype=torch.long)])  # fmt: skip
def test_prompts_of_another_form_are_refused(ids):
    with pytest.raises(InputError, match="input_ids has shape"):
        MODEL.generate(ids)


# -- 13: lengths -----------------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_the_context_is_refused_with_both_counts():
    with pytest.raises(PromptTooLong, match=r"9 tokens and max_new_tokens is 56.*holds 64.*at most 55"):
        MODEL.generate(prompts(), max_new_tokens=56)
    assert MODEL.generate(prompts(), max_new_tokens=55, eos_token_id=None).shape == (2, 64)
    with pytest.raises(PromptTooLong, match=r"70 tokens.*holds 64. Shorten the prompt to fewer than 64 tokens\.$"):
        MODEL.generate(prompts(width=70))


def test_padding_takes_no_room_in_the_context():
    ids, mask = left_padded([prompts()[0]], 60)
    assert MODEL.generate(ids, attention_mask=mask, max_new_tokens=20, eos_token_id=None).shape == (1, 80)


def test_a_prompt_that_does_not_fit_the_cache_is_refused_with_the_remedy():
    cache = gemmakit.StaticCache(MODEL.config, max_cache_len=15)
    with pytest.raises(PromptTooLong, match=r"9 tokens and max_new_tokens is 20.*holds 15.*max_cache_len=29"):
        MODEL.generate(prompts(), past_key_values=cache, max_new_tokens=20)
    assert cache.get_seq_length() == 0
    out = MODEL.generate(prompts(), past_key_values=cache, max_new_tokens=7, eos_token_id=None)
    assert out.shape == (2, 16)  # the last token is never run, so it needs no place


def test_max_length_must_leave_room_for_a_token():
    with pytest.raises(PromptTooLong, match="9 tokens and max_length is 9"):
        MODEL.generate(prompts(), max_length=9)


# -- 14: nothing to start from ---------------------------------------------------------------------------------------


def test_rows_of_only_padding_are_refused_by_number():
    ids = prompts(rows=3)
    mask = torch.ones_like(ids)
    ids[1], mask[1] = 0, 0
    with pytest.raises(InputError, match="row 1 of the batch is all padding"):
        MODEL.generate(ids, attention_mask=mask)
    with pytest.raises(InputError, match="row 1 of the batch is all padding"):
        MODEL.generate(ids)


def test_no_prompt_and_no_bos_is_refused():
    with pytest.raises(InputError, match="bos_token_id"):
        tiny(bos_token_id=None).generate()


@pytest.mark.parametrize("shape", [(2, 8), (1, 9), (3, 9), (2, 1, 9, 9)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match="attention_mask has shape"):
        MODEL.generate(prompts(), attention_mask=torch.ones(shape, dtype=torch.long))


def test_a_missing_or_doubled_bos_is_said():
    ids = prompts(rows=1)
    with pytest.warns(UserWarning, match="does not begin with <bos>"):
        MODEL.generate(ids[:, 1:], max_new_tokens=1)
    with pytest.warns(UserWarning, match="two <bos>"):
        MODEL.generate(torch.cat((ids[:, :1], ids), 1), max_new_tokens=1)


def test_arguments_that_contradict_each_other_are_refused():
    for asked, message in [
        (dict(inputs=prompts(), input_ids=prompts()), "same argument"),
        (dict(inputs=prompts(), num_return_sequences=2), "do_sample"),
        (dict(inputs=prompts(), seed=1, generator=torch.Generator(), do_sample=True), "seed and generator"),
        (dict(inputs=prompts(), stop_strings="x"), "tokenizer"),
    ]:
        with pytest.raises(InputError, match=message):
            MODEL.generate(**asked)


class NotATokenizersResult(dict):
    pass


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(inputs=NotATokenizersResult(input_ids=prompts())), r"unpack it, as in model\(\*\*inputs\)"),
        (dict(inputs=[[2, 3]]), "inputs is a list; it must be a tensor"),
        (dict(inputs=prompts().numpy()), "inputs is a ndarray"),
        (dict(inputs=prompts(), attention_mask=[[1] * 9] * 2), "attention_mask is a list"),
        (dict(inputs=prompts(), guidance_scale=2.0, negative_prompt_ids=[[2]]), "negative_prompt_ids is a list"),
        (dict(inputs=prompts(), generation_config={"top_k": 1}), "generation_config is a dict"),
        (dict(inputs=prompts(), past_key_values=5), "past_key_values is a builtins.int"),
        (dict(inputs=prompts(), do_sample=True, generator=5), "generator is a int.*seed="),
        (dict(inputs=prompts(), logits_processor=lambda ids, scores: scores), r"\[logits_processor\]"),
        (dict(inputs=prompts(), stopping_criteria=[5]), "stopping_criteria holds a int"),
        (dict(inputs=prompts(rows=1), assistant_model=torch.nn.Linear(2, 2)), "assistant_model is a torch.*Linear"),
        (dict(inputs=prompts(), stop_strings=5), "stop_strings is 5"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(asked, message):
    with pytest.raises(InputError, match=message):
        MODEL.generate(**asked)


def test_a_cache_in_the_older_form_may_be_a_list():
    ids = prompts(rows=1)
    with torch.no_grad():
        held = MODEL(ids[:, :4]).past_key_values.to_legacy_cache()
    plain = MODEL.generate(ids, max_new_tokens=4)
    assert torch.equal(MODEL.generate(ids, past_key_values=list(held), max_new_tokens=4), plain)


# -- 15: numbers that are none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(do_sample=True), dict(do_sample=True, seed=1),
                                      dict(do_sample=True, top_k=0, top_p=0.9, temperature=0.5)], ids=str)  # fmt: skip
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_stop_at_the_first_step(sampling, value):
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = value
    with pytest.raises(NumericalError, match="step 1, row 0"):
        model.generate(prompts(), max_new_tokens=3, **sampling)


@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(do_sample=True, seed=1)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_step_in_the_middle_is_named_with_its_row(sampling, value):
    def spoil(ids, scores):
        scores = scores.clone()
        if ids.shape[1] == 9 + 2:
            scores[1] = value
        return scores

    with pytest.raises(NumericalError, match="step 3, row 1"):
        MODEL.generate(prompts(), max_new_tokens=6, logits_processor=[spoil], eos_token_id=None, **sampling)


def test_a_row_that_has_ended_may_hold_anything():
    eos = int(MODEL.generate(prompts(), max_new_tokens=1)[1, -1])

    def spoil(ids, scores):
        scores = scores.clone()
        if ids.shape[1] > 9:
            scores[1] = math.nan
        return scores

    out = MODEL.generate(prompts(), max_new_tokens=4, eos_token_id=eos, pad_token_id=0, logits_processor=[spoil])
    assert out[1, 9:].tolist() == [eos, 0, 0, 0][: out.shape[1] - 9]


def test_a_forbidden_token_is_never_drawn():
    """-inf is no error while another token may be said."""

    def only(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([BOS + 3]), -1e30)

    out = MODEL.generate(prompts(), do_sample=True, seed=1, max_new_tokens=3, logits_processor=[only])
    assert set(out[:, 9:].flatten().tolist()) == {BOS + 3}
