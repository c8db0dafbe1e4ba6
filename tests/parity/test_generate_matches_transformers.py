"""Greedy tokens equal the oracle's whatever the padding, the cache and the settings; so do recorded outputs.

float32: tokens must be identical. bfloat16: the two libraries may round a logit the other way (see HALF in
test_forward_matches_transformers), so a row may part from the oracle where the oracle's two best logits are closer
than that, and only there.
"""

import pytest
import torch
import transformers
from parity_tools import apart, batch
from tiny_shapes import VOCAB

NEW = 14
SETTINGS = {
    "plain": dict(max_new_tokens=NEW),
    "repetition": dict(max_new_tokens=NEW, repetition_penalty=1.4),
    "min_new_tokens": dict(max_new_tokens=NEW, min_new_tokens=9),
    "min_length": dict(max_new_tokens=NEW, min_length=19),
    "max_length": dict(max_length=20),
    "everything": dict(max_new_tokens=NEW, repetition_penalty=1.2, min_new_tokens=4),
}
CACHES = {"dynamic": {}, "static": dict(cache_implementation="static"), "none": dict(use_cache=False)}


def ends(model, ids, mask):
    """Two tokens that the model does say, early and late, so that rows end at different steps."""
    said = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    new = said[:, ids.shape[1] :]
    return [int(new[0, 3]), int(new[1, 7])]


@pytest.fixture(scope="module")
def oracle(pair):
    made = {}

    def answer(dtype, padding, setting, eos):
        key = (dtype, padding, setting, eos)
        if key not in made:
            both = pair("gqa", dtype=dtype, attn="sdpa")
            ids, mask = batch(padding)
            asked = dict(SETTINGS[setting], do_sample=False, eos_token_id=ends(both.theirs, ids, mask) if eos else None)
            out = both.theirs.generate(
                ids, attention_mask=mask, output_logits=True, output_scores=True, return_dict_in_generate=True, **asked
            )
            made[key] = (both.ours, ids, mask, asked, out)
        return made[key]

    return answer


@pytest.mark.parametrize("eos", [False, True], ids=["endless", "eos_list"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
def test_greedy_tokens_are_identical_in_float32(oracle, cache, padding, setting, eos):
    ours, ids, mask, asked, theirs = oracle(torch.float32, padding, setting, eos)
    mine = ours.generate(ids, attention_mask=mask, **asked, **CACHES[cache])
    assert mine.tolist() == theirs.sequences.tolist()


@pytest.mark.parametrize("setting", ["plain", "repetition"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
def test_greedy_tokens_are_identical_in_bfloat16_but_for_ties(oracle, cache, padding, setting):
    ours, ids, mask, asked, theirs = oracle(torch.bfloat16, padding, setting, False)
    mine = ours.generate(ids, attention_mask=mask, **asked, **CACHES[cache])
    width, equal = ids.shape[1], 0
    for row, (a, b) in enumerate(zip(mine.tolist(), theirs.sequences.tolist(), strict=True)):
        parted = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        equal += (len(a) if parted is None else parted) - width
        if parted is not None:
            scores = theirs.scores[parted - width][row]
            best, second = scores.topk(2).values.tolist()
            assert best - second <= 8 * 2**-8 * float(scores.abs().max()), (row, parted)
    assert equal >= 0.7 * NEW * len(mine)  # ties are rare: the law is not empty


def test_the_oracle_does_end_rows_early_and_says_various_things(oracle):
    """What the grid relies on."""
    _, ids, _, _, plain = oracle(torch.float32, "left", "plain", False)
    _, _, _, asked, ended = oracle(torch.float32, "left", "plain", True)
    assert len(set(plain.sequences[:, ids.shape[1] :].flatten().tolist())) > 8
    assert (ended.sequences[:, ids.shape[1] :] == 0).any()
    assert len(asked["eos_token_id"]) == 2


@pytest.mark.parametrize("shape", ["mqa", "mha"])
def test_greedy_tokens_are_identical_over_many_prompts(pair, shape):
    both = pair(shape, attn="sdpa")
    for seed in range(8):
        ids, mask = batch("left", rows=3, seed=seed)
        asked = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert both.ours.generate(ids, **asked).tolist() == both.theirs.generate(ids, **asked).tolist()


def test_one_long_answer_up_to_the_end_of_the_context(pair):
    both = pair("gqa", attn="sdpa")
    ids, _ = batch("none", rows=1, width=6)
    asked = dict(max_length=96, do_sample=False, eos_token_id=None)
    assert both.ours.generate(ids, **asked).tolist() == both.theirs.generate(ids, **asked).tolist()


def test_the_models_own_settings_are_read_from_the_checkpoint(pair, tmp_path):
    both = pair("gqa")
    both.theirs.generation_config.update(max_new_tokens=5, repetition_penalty=1.3)
    both.theirs.save_pretrained(tmp_path)
    ours = type(both.ours).from_pretrained(tmp_path)
    ids, _ = batch("none")
    assert ours.generate(ids).tolist() == both.theirs.generate(ids).tolist()


@pytest.mark.parametrize("padding", ["none", "left"])
def test_recorded_scores_and_logits_equal_the_oracle(oracle, padding):
    ours, ids, mask, asked, theirs = oracle(torch.float32, padding, "everything", True)
    mine = ours.generate(
        ids, attention_mask=mask, output_logits=True, output_scores=True, return_dict_in_generate=True, **asked
    )
    assert mine.sequences.tolist() == theirs.sequences.tolist()
    steps = mine.sequences.shape[1] - ids.shape[1]
    for a, b in ((mine.logits, theirs.logits), (mine.scores, theirs.scores)):
        assert len(a) == len(b) == steps
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape == (3, VOCAB)
            assert x.dtype == y.dtype == torch.float32
            assert torch.equal(x == -torch.inf, y == -torch.inf)
            # Rows that have ended go on from whatever fills them; only what can be said is compared.
            live = torch.isfinite(y)
            assert apart(x[live], y[live]) < 5e-5  # the forward's 2e-5, divided by penalties and through the cache
    assert mine.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


def test_recorded_hidden_states_and_attentions_have_the_oracles_form_and_values(pair):
    both = pair("gqa")
    ids, mask = batch("left")
    asked = dict(
        attention_mask=mask, max_new_tokens=3, do_sample=False, output_hidden_states=True, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    mine, theirs = both.ours.generate(ids, **asked), both.theirs.generate(ids, **asked)
    assert mine.sequences.tolist() == theirs.sequences.tolist()
    for name in ("hidden_states", "attentions"):
        a, b = mine[name], theirs[name]
        assert [len(step) for step in a] == [len(step) for step in b]
        for step, (x, y) in enumerate(zip(a, b, strict=True)):
            for p, q in zip(x, y, strict=True):
                assert p.shape == q.shape
                at = mask if step == 0 else None
                if name == "attentions":
                    p, q = p.transpose(1, 2), q.transpose(1, 2)
                assert apart(p, q, at) < 2e-5


WARPERS = {
    "temperature": dict(temperature=0.6),
    "hot": dict(temperature=3.0),
    "top_k": dict(top_k=7),
    "top_p": dict(top_k=0, top_p=0.6),
    "min_p": dict(top_k=0, min_p=0.15),
    "all": dict(temperature=1.3, top_k=20, top_p=0.8, min_p=0.02, repetition_penalty=1.2),
}


@pytest.mark.parametrize("settings", WARPERS.values(), ids=WARPERS)
def test_sampled_distributions_equal_the_oracles_warpers_step_by_step(pair, settings):
    both = pair("gqa")
    ids, mask = batch("left")
    asked = {"top_k": 50, **settings, "do_sample": True, "max_new_tokens": 6, "eos_token_id": None}
    mine = both.ours.generate(
        ids, attention_mask=mask, seed=3, output_scores=True, output_logits=True, return_dict_in_generate=True, **asked
    )
    t = transformers.generation.logits_process
    chain = []
    if "repetition_penalty" in settings:
        chain.append(t.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if "temperature" in settings:
        chain.append(t.TemperatureLogitsWarper(settings["temperature"]))
    if asked["top_k"]:
        chain.append(t.TopKLogitsWarper(asked["top_k"]))
    if "top_p" in settings:
        chain.append(t.TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        chain.append(t.MinPLogitsWarper(settings["min_p"]))
    dropped = 0
    for step, (logits, scores) in enumerate(zip(mine.logits, mine.scores, strict=True)):
        sofar = mine.sequences[:, : ids.shape[1] + step]
        # transformers also counts the padding as said; gemmakit does not, so that padding changes nothing.
        sofar = torch.where(sofar == 0, sofar[:, 10:11], sofar)
        expected = logits
        for warper in chain:
            expected = warper(sofar, expected)
        assert torch.allclose(scores.softmax(-1), expected.softmax(-1), atol=1e-6)  # a few float32 steps
        dropped += int((scores == -torch.inf).sum())
        assert torch.equal(scores == -torch.inf, expected == -torch.inf)
    assert dropped
    assert torch.isfinite(torch.stack(mine.scores).gather(2, mine.sequences[:, ids.shape[1] :].T[..., None])).all()
