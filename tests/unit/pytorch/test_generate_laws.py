"""Laws of generate(): padding, neighbours, caches, seeds and chunks never change what a prompt gets."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gemma import BOS, VOCAB, left_padded, prompts, tiny

import gemmakit

NEW = 8
MODEL = tiny(attn_implementation="sdpa")
EAGER = tiny(attn_implementation="eager")


def rows_of(*lengths, seed=1):
    return [prompts(rows=1, width=n, seed=seed + i)[0] for i, n in enumerate(lengths)]


def new_tokens(out, prompt):
    return out[:, prompt.shape[1] :].tolist()


def alone(row, **asked):
    return new_tokens(MODEL.generate(row[None], **asked), row[None])[0]


# -- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MODEL, EAGER], ids=["sdpa", "eager"])
def test_greedy_decoding_takes_the_peak_of_the_full_forward(model):
    ids = prompts(rows=3)
    out = model.generate(ids, max_new_tokens=NEW, eos_token_id=None)
    assert out.shape == (3, 9 + NEW)
    assert torch.equal(out[:, :9], ids)
    for i in range(NEW):
        assert torch.equal(out[:, 9 + i], model(out[:, : 9 + i]).logits[:, -1].argmax(-1))


@pytest.mark.filterwarnings("ignore:a prompt begins with two <bos>")
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    extra=st.integers(0, 20),
    cache=st.sampled_from([{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}]),
    inferred=st.booleans(),
    seed=st.integers(0, 99),
)
def test_left_padding_of_any_width_does_not_change_tokens(lengths, extra, cache, inferred, seed):
    rows = rows_of(*lengths, seed=seed)
    ids, mask = left_padded(rows, max(lengths) + extra)
    out = MODEL.generate(ids, attention_mask=None if inferred else mask, max_new_tokens=5, eos_token_id=None, **cache)
    assert new_tokens(out, ids) == [alone(r, max_new_tokens=5, eos_token_id=None) for r in rows]


def test_left_padding_does_not_change_penalties():
    """A pad token in front is not a token that was said."""
    rows = rows_of(3, 9)
    ids, mask = left_padded(rows, 12)
    asked = dict(max_new_tokens=NEW, repetition_penalty=5.0, eos_token_id=None)
    favour_pad = [lambda _, scores: scores.index_add(1, torch.tensor([0]), torch.full((len(scores), 1), 12.0))]
    out = MODEL.generate(ids, attention_mask=mask, logits_processor=favour_pad, **asked)
    assert new_tokens(out, ids) == [alone(r, logits_processor=favour_pad, **asked) for r in rows]


def test_batch_mates_do_not_change_tokens():
    rows = rows_of(4, 9, 6, 2)
    asked = dict(max_new_tokens=NEW)
    expected = [alone(r, **asked) for r in rows]
    for order in ([0, 1, 2, 3], [3, 1], [2, 0, 2]):
        ids, mask = left_padded([rows[i] for i in order], 9)
        for i, got in zip(order, new_tokens(MODEL.generate(ids, attention_mask=mask, **asked), ids), strict=True):
            assert got[: len(expected[i])] == expected[i]
            assert not any(got[len(expected[i]) :])  # filled with pad


def test_rows_that_end_are_filled_with_pad_and_do_not_change_the_others():
    ids = prompts(rows=3)
    endless = new_tokens(MODEL.generate(ids, max_new_tokens=NEW, eos_token_id=None), ids)
    eos = endless[1][2]
    out = new_tokens(MODEL.generate(ids, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=7), ids)
    longest = 0
    for got, whole in zip(out, endless, strict=True):
        end = whole.index(eos) + 1 if eos in whole else NEW
        longest = max(longest, end)
        assert got[:end] == whole[:end]
        assert set(got[end:]) <= {7}
    assert len(out[0]) == longest  # the loop stops when all rows have ended


@pytest.mark.parametrize(
    "work", [{"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 1},
             {"prefill_chunk_size": 4}, {"prefill_chunk_size": 100},
             {"cache_implementation": "static", "prefill_chunk_size": 2}], ids=str,
)  # fmt: skip
def test_the_way_of_working_does_not_change_tokens(work):
    ids, mask = left_padded(rows_of(11, 5), 11)
    plain = MODEL.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(MODEL.generate(ids, attention_mask=mask, max_new_tokens=NEW, **work), plain)


def test_chunks_are_really_passed_one_by_one():
    seen = []
    hook = MODEL.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs or args), with_kwargs=True)
    widths = []
    hook2 = MODEL.model.embed_tokens.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    MODEL.generate(prompts(width=9), max_new_tokens=3, prefill_chunk_size=4, eos_token_id=None)
    hook.remove(), hook2.remove()
    assert widths == [4, 4, 1, 1, 1]
    assert len(seen) == 5


def test_lengths_count_new_tokens_or_all_tokens():
    ids = prompts()
    assert MODEL.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (2, 12)
    assert MODEL.generate(ids, max_length=13, eos_token_id=None).shape == (2, 13)
    assert MODEL.generate(ids, max_length=50, max_new_tokens=2, eos_token_id=None).shape == (2, 11)
    assert MODEL.generate(ids, eos_token_id=None).shape == (2, 29)


# -- what it starts from ---------------------------------------------------------------------------------------------


def test_no_prompt_starts_from_bos():
    from_bos = MODEL.generate(torch.tensor([[BOS]]), max_new_tokens=NEW)
    assert torch.equal(MODEL.generate(max_new_tokens=NEW), from_bos)
    assert torch.equal(MODEL.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=NEW), from_bos)


def test_inputs_embeds_alone_give_the_new_tokens_of_their_ids():
    ids = prompts()
    embeds = MODEL.get_input_embeddings()(ids)
    out = MODEL.generate(inputs_embeds=embeds, max_new_tokens=NEW)
    assert out.tolist() == new_tokens(MODEL.generate(ids, max_new_tokens=NEW), ids)
    padded, mask = left_padded(rows_of(4, 9), 9)
    embeds = MODEL.get_input_embeddings()(padded)
    out = MODEL.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW)
    assert out.tolist() == new_tokens(MODEL.generate(padded, attention_mask=mask, max_new_tokens=NEW), padded)


def first_turn(rows, width):
    ids, mask = left_padded(rows, width)
    out = MODEL.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True)
    more = prompts(rows=len(rows), width=3, seed=50)[:, 1:]
    return ids, mask, out, more


@pytest.mark.parametrize("lengths", [(6,), (6, 6), (6, 3)], ids=["one", "even", "padded"])
@pytest.mark.parametrize("what", ["full", "new"])
def test_continuing_from_a_cache_equals_starting_over(lengths, what):
    _, mask, out, more = first_turn(rows_of(*lengths), 6)
    full = torch.cat((out.sequences, more), 1)
    seen = torch.cat((mask, torch.ones(len(lengths), 6, dtype=torch.long)), 1)
    afresh = new_tokens(MODEL.generate(full, attention_mask=seen, max_new_tokens=NEW), full)
    cache = out.past_key_values
    held = cache.get_seq_length()
    assert held == out.sequences.shape[1] - 1  # the last token was never run
    prompt = full if what == "full" else full[:, held:]
    again = MODEL.generate(prompt, attention_mask=seen, past_key_values=cache, max_new_tokens=NEW)
    assert new_tokens(again, prompt) == afresh
    assert torch.equal(again[:, : prompt.shape[1]], prompt)


@pytest.mark.parametrize("what", ["full", "new"])
def test_continuing_from_a_cache_needs_no_mask_without_padding(what):
    *_, out, more = first_turn(rows_of(6, 6), 6)
    full = torch.cat((out.sequences, more), 1)
    afresh = new_tokens(MODEL.generate(full, max_new_tokens=NEW), full)
    prompt = full if what == "full" else full[:, out.past_key_values.get_seq_length() :]
    again = MODEL.generate(prompt, past_key_values=out.past_key_values, max_new_tokens=NEW)
    assert new_tokens(again, prompt) == afresh


def test_continuing_a_padded_batch_infers_the_padding_again():
    """The first call infers the mask from the pad tokens; the second must see the same tokens as padding."""
    _, mask, out, more = first_turn(rows_of(6, 3), 6)
    full = torch.cat((out.sequences, more), 1)
    seen = torch.cat((mask, torch.ones(2, 6, dtype=torch.long)), 1)
    afresh = MODEL.generate(full, attention_mask=seen, max_new_tokens=NEW)
    assert torch.equal(MODEL.generate(full, past_key_values=out.past_key_values, max_new_tokens=NEW), afresh)


def test_an_empty_cache_given_by_the_caller_changes_nothing():
    ids, _ = left_padded(rows_of(6, 3), 8)
    plain = MODEL.generate(ids, max_new_tokens=NEW)
    for cache in (gemmakit.DynamicCache(), gemmakit.StaticCache(MODEL.config, max_cache_len=30)):
        assert torch.equal(MODEL.generate(ids, past_key_values=cache, max_new_tokens=NEW), plain)


# -- processors, criteria, streamers ---------------------------------------------------------------------------------


def script(tokens, width):
    """A processor that makes the model say these tokens."""

    def say(ids, scores):
        step = ids.shape[1] - width
        forced = torch.full_like(scores, -torch.inf)
        forced[:, tokens[min(step, len(tokens) - 1)]] = 0.0
        return forced

    return say


def test_custom_processors_see_all_ids_and_float32_scores():
    seen = []

    def note(ids, scores):
        seen.append((ids.clone(), scores.dtype, tuple(scores.shape)))
        return scores

    ids = prompts()
    out = tiny().bfloat16().generate(ids, max_new_tokens=4, eos_token_id=None, logits_processor=[note])
    assert [s[0].tolist() for s in seen] == [out[:, : 9 + i].tolist() for i in range(4)]
    assert {s[1:] for s in seen} == {(torch.float32, (2, VOCAB))}


def test_custom_processors_decide():
    ids = prompts()
    out = MODEL.generate(ids, max_new_tokens=3, logits_processor=[script([9, 8, 7], 9)])
    assert new_tokens(out, ids) == [[9, 8, 7]] * 2


def test_custom_criteria_end_rows_one_by_one_or_all_at_once():
    ids = prompts()
    asked = dict(max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)

    def second_row_after_three(ids, scores):
        return torch.tensor([False, ids.shape[1] >= 12])

    out = new_tokens(MODEL.generate(ids, stopping_criteria=[second_row_after_three], **asked), ids)
    endless = new_tokens(MODEL.generate(ids, **asked), ids)
    assert out == [endless[0], endless[1][:3] + [0] * (NEW - 3)]
    both = MODEL.generate(ids, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 14], **asked)
    assert new_tokens(both, ids) == [row[:5] for row in endless]


def test_max_time_ends_after_the_first_token_that_is_too_late():
    assert MODEL.generate(prompts(), max_new_tokens=50, max_time=1e-9, eos_token_id=None).shape == (2, 10)


class Pieces:
    """A tokenizer of ten pieces, one of them half a character."""

    names = ("<pad>", "<eos>", "<bos>", "\u2581he", "l", "lo", "wor", "<0xC3>", "<0xA9>", "d!")
    all_special_ids = (0, 1, 2)

    def get_vocab(self):
        return {name: i for i, name in enumerate(self.names)}

    def encode(self, text, *, add_special_tokens=True, split_special_tokens=False):
        raise NotImplementedError("stop strings are compared with what is said, never encoded")

    def decode(self, ids, **_):
        said = b""
        for token in ids:
            byte = re.fullmatch("<0x(..)>", self.names[int(token)])
            said += bytes([int(byte[1], 16)]) if byte else self.names[int(token)].replace("\u2581", " ").encode()
        return said.decode(errors="replace")


@pytest.mark.parametrize(
    ("said", "stops", "kept"),
    [
        ([3, 4, 5, 6, 9], "llo", 3),  # " he" "l" "lo"
        ([3, 4, 5, 6, 9], ["zzz", "ow"], 4),  # across "lo" and "wor"
        ([3, 4, 5, 6, 9], " h", 1),  # in the middle of a piece
        ([3, 7, 8, 4], "\u00e9", 3),  # one character of two byte tokens
        ([3, 4, 5, 6, 9], "heol", 5),  # never said
        ([3, 4, 5, 6, 9], "d!", 5),
    ],
)
def test_stop_strings_end_a_row_wherever_their_letters_fall(said, stops, kept):
    ids = torch.tensor([[2, 6]])
    out = MODEL.generate(
        ids, max_new_tokens=5, stop_strings=stops, tokenizer=Pieces(), logits_processor=[script(said, 2)],
        eos_token_id=None,
    )  # fmt: skip
    assert new_tokens(out, ids) == [(said + [said[-1]] * 5)[:kept]]


def test_a_stop_string_of_the_prompt_ends_nothing_but_one_that_began_there_does():
    ids = torch.tensor([[2, 3, 4, 5]])
    asked = dict(max_new_tokens=3, tokenizer=Pieces(), eos_token_id=None, logits_processor=[script([6, 9], 4)])
    assert MODEL.generate(ids, stop_strings="llo", **asked).shape == (1, 7)
    assert MODEL.generate(ids, stop_strings="low", **asked).shape == (1, 5)


class Notes:
    def __init__(self):
        self.said = []

    def put(self, value):
        self.said.append(value)

    def end(self):
        self.said.append("end")


def test_a_streamer_is_told_the_prompt_then_every_token_in_order_then_the_end():
    ids, notes = prompts(rows=1), Notes()
    out = MODEL.generate(ids, max_new_tokens=NEW, eos_token_id=None, streamer=notes)
    prompt, *tokens, end = notes.said
    assert prompt.tolist() == ids.tolist()
    assert [t.tolist() for t in tokens] == [[t] for t in out[0, 9:].tolist()]
    assert end == "end"


def test_a_streamer_is_told_the_end_when_something_fails():
    notes = Notes()

    def fail(ids, scores):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        MODEL.generate(prompts(rows=1), max_new_tokens=3, streamer=notes, logits_processor=[fail])
    assert notes.said[-1] == "end"


def test_a_streamer_follows_one_row_only():
    with pytest.raises(ValueError, match="one row"):
        MODEL.generate(prompts(rows=2), streamer=Notes())


# -- sampling --------------------------------------------------------------------------------------------------------


def draws(probabilities, count, **asked):
    """How often each token is drawn as the first new one."""
    p = torch.tensor(probabilities)

    def fixed(ids, scores):
        out = torch.full_like(scores, -torch.inf)
        out[:, : len(p)] = p.log()
        return out

    out = MODEL.generate(
        torch.tensor([[BOS]]), do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=count,
        logits_processor=[fixed], eos_token_id=None, **asked,
    )  # fmt: skip
    return torch.bincount(out[:, 1], minlength=VOCAB)


def chi_square(counts, probabilities):
    expected = torch.tensor(probabilities, dtype=torch.float64) * counts.sum()
    return float(((counts[: len(probabilities)] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("how", ["generator", "seed"])
def test_tokens_are_drawn_by_their_probability(how):
    """Chi-square with 6 degrees of freedom: above 27.9 once in 10000 seeds; the seed is fixed."""
    p = [0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01]
    asked = {"seed": 11} if how == "seed" else {"generator": torch.Generator().manual_seed(12)}
    counts = draws(p, 4000, **asked)
    assert int(counts[len(p) :].sum()) == 0
    assert chi_square(counts, p) < 27.9
    assert chi_square(counts, p[::-1]) > 1000  # the statistic does see a wrong distribution


def test_temperature_and_top_p_shape_the_draws():
    p = [0.5, 0.3, 0.15, 0.05]
    counts = draws(p, 3000, seed=5, temperature=0.5)
    squared = [x * x / sum(y * y for y in p) for x in p]
    assert chi_square(counts, squared) < 21.1  # 3 degrees of freedom, once in 10000
    cut = draws(p, 2000, seed=6, top_p=0.7)
    assert chi_square(cut, [0.625, 0.375]) < 15.1  # 1 degree
    assert int(cut[2:].sum()) == 0


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    ids = prompts()
    asked = dict(do_sample=True, max_new_tokens=NEW, eos_token_id=None, temperature=2.0)
    first, again = (MODEL.generate(ids, seed=4, **asked) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(MODEL.generate(ids, seed=5, **asked), first)
    for seed in (0, 2**63 - 1):
        assert MODEL.generate(ids, seed=seed, **asked).shape == first.shape


def test_one_generator_gives_the_same_tokens_from_the_same_state():
    ids = prompts()
    asked = dict(do_sample=True, max_new_tokens=NEW, eos_token_id=None)
    first, again = (MODEL.generate(ids, generator=torch.Generator().manual_seed(4), **asked) for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(8)
    a = MODEL.generate(ids, **asked)
    torch.manual_seed(8)
    assert torch.equal(MODEL.generate(ids, **asked), a)


def test_a_rows_samples_do_not_depend_on_its_batch_mates():
    rows = rows_of(4, 9, 6)
    asked = dict(do_sample=True, seed=9, max_new_tokens=NEW, eos_token_id=None)
    expected = [alone(r, **asked) for r in rows]
    for order in ([0, 1, 2], [2, 0], [1, 2]):
        ids, mask = left_padded([rows[i] for i in order], 12)
        out = MODEL.generate(ids, attention_mask=mask, **asked)
        assert new_tokens(out, ids) == [expected[i] for i in order]


def test_identical_prompts_draw_different_samples():
    ids = prompts(rows=1)
    asked = dict(do_sample=True, seed=9, max_new_tokens=NEW, eos_token_id=None, temperature=3.0, top_k=0)
    for out in (MODEL.generate(ids.expand(5, -1), **asked), MODEL.generate(ids, num_return_sequences=5, **asked)):
        assert len({tuple(row) for row in out.tolist()}) == 5


def test_copies_of_a_prompt_draw_as_if_the_batch_held_them():
    ids = prompts(rows=2)
    asked = dict(do_sample=True, seed=9, max_new_tokens=NEW, eos_token_id=None)
    copies = MODEL.generate(ids, num_return_sequences=3, **asked)
    assert torch.equal(copies, MODEL.generate(ids.repeat_interleave(3, 0), **asked))


def test_top_k_one_is_greedy():
    ids = prompts()
    greedy = MODEL.generate(ids, max_new_tokens=NEW)
    assert torch.equal(MODEL.generate(ids, do_sample=True, top_k=1, max_new_tokens=NEW), greedy)
    assert torch.equal(MODEL.generate(ids, do_sample=True, top_k=0, top_p=0.0, max_new_tokens=NEW), greedy)


# -- settings --------------------------------------------------------------------------------------------------------


def test_the_call_wins_over_the_models_settings_and_leaves_them_alone():
    model = tiny()
    model.generation_config.update(max_new_tokens=3, eos_token_id=None)
    assert model.generate(prompts()).shape == (2, 12)
    assert model.generate(prompts(), max_new_tokens=5).shape == (2, 14)
    own = gemmakit.GenerationConfig(max_new_tokens=2, pad_token_id=0)
    assert model.generate(prompts(), own).shape == (2, 11)
    assert model.generate(prompts(), generation_config=own, max_new_tokens=6).shape == (2, 15)
    assert model.generation_config.max_new_tokens == 3
    assert own.max_new_tokens == 2


def test_generation_leaves_no_graph_and_no_training_mode_behind():
    model = tiny()
    out = model.generate(prompts(), max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    assert not out.logits[0].requires_grad
    assert torch.is_grad_enabled()


def test_results_are_ids_or_named_outputs():
    ids = prompts()
    plain = MODEL.generate(ids, max_new_tokens=2)
    assert plain.dtype == torch.long
    out = MODEL.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert list(out) == ["sequences", "past_key_values"]
    assert "past_key_values" not in MODEL.generate(ids, max_new_tokens=2, return_dict_in_generate=True, use_cache=False)
