"""generate(): the tokens of the PyTorch backend, one compilation a bucket, nothing silent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax_tools import CountCompilations, as_torch, batch, make_torch

import gemmakit
from gemmakit.errors import GenerationConfigError, InputError, NumericalError, PromptTooLong, TokenOutOfRange
from gemmakit.flax import FlaxGemmaForCausalLM
from gemmakit.flax.decode import step
from gemmakit.flax.decode.processors import process
from gemmakit.flax.decode.prompt import bucket, knobs, make_plan, refuse_unsupported

EOS = [5, 17, 29, 41, 53, 65, 77, 89]


@pytest.fixture(scope="module")
def pair(both):
    return both("mqa", max_position_embeddings=256)


def prompts(count, longest, seed=0, vocab=160):
    """(1, n) each, n from 1 to longest, beginning with <bos>."""
    rng = np.random.default_rng(seed)
    return [np.concatenate(([2], rng.integers(4, vocab, n)))[None] for n in rng.integers(0, longest, count)]


def left_padded(rows):
    width = max(row.shape[1] for row in rows)
    ids = np.concatenate([np.pad(row, ((0, 0), (width - row.shape[1], 0))) for row in rows])
    mask = np.concatenate([np.pad(np.ones_like(row), ((0, 0), (width - row.shape[1], 0))) for row in rows])
    return ids, mask


def same_tokens(model, oracle, ids, mask, **settings):
    with torch.no_grad():
        theirs = oracle.generate(as_torch(ids), attention_mask=as_torch(mask), **settings).numpy()
    ours = np.asarray(model.generate(ids, attention_mask=mask, **settings).sequences)
    assert ours.shape == theirs.shape, settings
    np.testing.assert_array_equal(ours, theirs)


def test_greedy_tokens_of_fifty_prompts_are_pytorchs(pair):
    """Alone, and the same prompts left-padded in batches of ten."""
    rows = prompts(50, 31)
    for row in rows:
        same_tokens(pair.flax, pair.torch, row, None, max_new_tokens=12)
    for at in range(0, 50, 10):
        same_tokens(pair.flax, pair.torch, *left_padded(rows[at : at + 10]), max_new_tokens=12)


def test_ten_lengths_of_one_bucket_compile_once(pair):
    rng = np.random.default_rng(1)
    lengths = range(39, 49)
    assert {bucket(n) for n in lengths} == {48}
    before = step.go_on._cache_size()
    with CountCompilations() as first:
        pair.flax.generate(np.append([[2]], rng.integers(4, 160, (1, 38)), axis=1), max_new_tokens=9)
    assert first.count >= 1
    with CountCompilations() as rest:
        for length in lengths:
            new = 9 + length % 7  # another number of new tokens is another number, no other code
            pair.flax.generate(np.append([[2]], rng.integers(4, 160, (1, length - 1)), axis=1), max_new_tokens=new)
    assert rest.count == 0
    assert step.go_on._cache_size() == before + 1


def test_models_of_one_shape_share_compiled_code(pair):
    twin = FlaxGemmaForCausalLM.from_pretrained(pair.folder)
    ids, mask = batch("left")
    pair.flax.generate(ids, attention_mask=mask, max_new_tokens=5)
    size = step.go_on._cache_size()
    twin.generate(ids, attention_mask=mask, max_new_tokens=6)
    assert step.go_on._cache_size() == size


@pytest.mark.parametrize("length", [1, 16, 17, 24, 25, 33, 47, 48, 49, 64, 100, 700])
def test_a_bucket_is_at_most_half_as_much_again(length):
    assert length <= bucket(length) <= max(16, 1.5 * length)
    assert bucket(bucket(length)) == bucket(length)


def test_left_padding_and_neighbours_do_not_change_a_rows_tokens(pair):
    rows = prompts(6, 20, seed=3)
    ids, mask = left_padded(rows)
    together = np.asarray(pair.flax.generate(ids, attention_mask=mask, max_new_tokens=8).sequences)[:, -8:]
    inferred = np.asarray(pair.flax.generate(ids, max_new_tokens=8).sequences)[:, -8:]
    np.testing.assert_array_equal(inferred, together)
    for row, tokens in zip(rows, together, strict=True):
        np.testing.assert_array_equal(np.asarray(pair.flax.generate(row, max_new_tokens=8).sequences)[0, -8:], tokens)


def test_rows_end_at_any_eos_and_the_result_is_trimmed(pair):
    ids, mask = batch("left")
    same_tokens(pair.flax, pair.torch, ids, mask, max_new_tokens=30, eos_token_id=EOS, pad_token_id=3)
    one = np.asarray(pair.flax.generate(ids[:1], max_new_tokens=30, eos_token_id=EOS).sequences)[0, 11:]
    assert one[-1] in EOS or len(one) == 30
    assert not np.isin(one[:-1], EOS).any()


@pytest.mark.parametrize("settings", [
    dict(num_beams=3),
    dict(num_beams=4, num_return_sequences=2, length_penalty=1.5, eos_token_id=EOS),
    pytest.param(dict(num_beams=3, early_stopping=True, eos_token_id=EOS), marks=pytest.mark.slow),
    pytest.param(dict(num_beams=3, early_stopping="never", eos_token_id=EOS), marks=pytest.mark.slow),
    pytest.param(dict(num_beams=2, length_penalty=-1.0, eos_token_id=EOS), marks=pytest.mark.slow),
])  # fmt: skip
def test_beams_are_pytorchs(pair, settings):
    ids, mask = batch("left")
    for seed in range(3):
        ids, mask = batch("left", seed=seed)
        same_tokens(pair.flax, pair.torch, ids, mask, max_new_tokens=10, **settings)


def test_scores_of_beams_are_pytorchs(pair):
    ids, mask = batch("left")
    settings = dict(num_beams=3, max_new_tokens=10, return_dict_in_generate=True, output_scores=True)
    theirs = pair.torch.generate(as_torch(ids), attention_mask=as_torch(mask), **settings).sequences_scores
    ours = pair.flax.generate(ids, attention_mask=mask, **settings).sequences_scores
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_what_forbids_and_shapes_is_pytorchs(pair):
    ids, mask = batch("left")
    settings = dict(repetition_penalty=1.4, min_new_tokens=6, suppress_tokens=[9, 12, 33],
                    begin_suppress_tokens=[50, 51], forced_eos_token_id=7, eos_token_id=[*EOS, 7])  # fmt: skip
    same_tokens(pair.flax, pair.torch, ids, mask, max_new_tokens=12, **settings)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_n_grams_that_may_not_repeat_are_pytorchs(pair, size):
    """A vocabulary of 40, prompts that repeat themselves: greedy text would come back to what it said."""
    rng = np.random.default_rng(size)
    ids, mask = left_padded([np.append([[2]], rng.integers(4, 12, (1, n)), axis=1) for n in (1, 5, 17)])
    settings = dict(no_repeat_ngram_size=size, suppress_tokens=list(range(44, 160)), max_new_tokens=20)
    settings |= dict(eos_token_id=None, pad_token_id=0)
    same_tokens(pair.flax, pair.torch, ids, mask, **settings)
    same_tokens(pair.flax, pair.torch, ids, mask, **settings, num_beams=2)
    free = pair.flax.generate(ids, attention_mask=mask, **{**settings, "no_repeat_ngram_size": 0}).sequences
    kept = pair.flax.generate(ids, attention_mask=mask, **settings).sequences
    assert (np.asarray(free) != np.asarray(kept)).any()


def test_a_forced_first_token_is_pytorchs_and_comes_after_one_token_alone(pair):
    settings = dict(forced_bos_token_id=9, begin_suppress_tokens=[9, 50], max_new_tokens=5, eos_token_id=None)
    for ids in (np.asarray([[2]]), np.asarray([[2, 8, 31]])):
        same_tokens(pair.flax, pair.torch, ids, None, **settings)
    assert np.asarray(pair.flax.generate(**settings).sequences)[0, :2].tolist() == [2, 9]


def test_a_tokenizers_whole_result_in_place_of_ids_is_named(pair):
    whole = gemmakit.BatchEncoding({"input_ids": np.asarray([[2, 5]]), "attention_mask": np.asarray([[1, 1]])})
    with pytest.raises(InputError, match=r"input_ids is a BatchEncoding; .* as in model\(\*\*input_ids\)"):
        pair.flax(whole)
    with pytest.raises(InputError, match=r"as in generate\(\*\*input_ids\)"):
        pair.flax.generate(whole)


# By transformers' name, with its arguments -> the setting of the same meaning.
NAMES = {
    "FlaxNoRepeatNGramLogitsProcessor": ((2,), dict(no_repeat_ngram_size=2)),
    "FlaxForcedBOSTokenLogitsProcessor": ((9,), dict(forced_bos_token_id=9)),
    "FlaxForcedEOSTokenLogitsProcessor": ((9, 7), dict(forced_eos_token_id=7)),
    "FlaxMinLengthLogitsProcessor": ((6, 5), dict(min_length=6)),
    "FlaxSuppressTokensLogitsProcessor": (([9, 12],), dict(suppress_tokens=[9, 12])),
    "FlaxSuppressTokensAtBeginLogitsProcessor": (([9, 12], 1), dict(begin_suppress_tokens=[9, 12])),
    "FlaxTemperatureLogitsWarper": ((0.7,), dict(temperature=0.7)),
    "FlaxTopKLogitsWarper": ((7,), dict(top_k=7)),
    "FlaxTopPLogitsWarper": ((0.6,), dict(top_p=0.6)),
}


@pytest.mark.parametrize("name", NAMES)
def test_transformers_names_of_processors_do_what_the_settings_do(name):
    arguments, setting = NAMES[name]
    made = getattr(gemmakit, name)(*arguments)
    config = gemmakit.GenerationConfig(
        eos_token_id=5, **setting, do_sample=True, **{} if "top_k" in setting else {"top_k": 0}
    )
    plan = make_plan(config, 1, 8, ())
    scores = jax.random.normal(jax.random.PRNGKey(0), (2, 40)) * 3
    ids = jax.random.randint(jax.random.PRNGKey(1), (2, 9), 9, 12)
    numbers = knobs(config, 8, 1)
    for length in range(1, 9):
        seen = jnp.broadcast_to(jnp.arange(9) < length, ids.shape)
        theirs = process(plan, numbers, scores, jnp.int32(length - 1), ids, seen)
        np.testing.assert_array_equal(made(ids, scores, jnp.int32(length)), theirs)
    assert made == getattr(gemmakit, name)(*arguments)


def test_lists_of_processors_go_to_generate_and_share_compiled_code(pair):
    ids, mask = batch("left")

    def run():
        processors = [gemmakit.FlaxSuppressTokensLogitsProcessor([9]), gemmakit.FlaxTopKLogitsWarper(3)]
        made = gemmakit.FlaxLogitsProcessorList(processors)
        return pair.flax.generate(ids, attention_mask=mask, max_new_tokens=5, logits_processor=made).sequences

    first = run()
    with CountCompilations() as again:
        np.testing.assert_array_equal(run(), first)
    assert again.count == 0


@pytest.mark.filterwarnings("ignore:min_length is")
def test_min_new_tokens_wins_over_min_length(pair):
    ids, mask = batch("left")
    settings = dict(max_new_tokens=8, min_length=ids.shape[1] + 5, eos_token_id=list(range(4, 160)))
    for more in ({}, {"min_new_tokens": 2}):
        same_tokens(pair.flax, pair.torch, ids, mask, **settings, **more)


def test_custom_processors_are_traced(pair):
    ids, mask = batch("left")

    def even(ids, scores, length):
        return jnp.where(jnp.arange(scores.shape[-1]) % 2 == 0, scores, -jnp.inf)

    out = pair.flax.generate(ids, attention_mask=mask, max_new_tokens=6, logits_processor=[even])
    assert not (np.asarray(out.sequences)[:, 11:] % 2).any()


def sampled(model, ids, mask=None, **settings):
    settings = {"max_new_tokens": 8, "do_sample": True, **settings}
    return np.asarray(model.generate(ids, attention_mask=mask, **settings).sequences)[:, ids.shape[1] :]


def test_a_row_draws_by_seed_and_prompt_whatever_its_neighbours(pair):
    ids, mask = batch("left")
    first = sampled(pair.flax, ids, mask, seed=11)
    np.testing.assert_array_equal(first, sampled(pair.flax, ids, mask, seed=11))
    np.testing.assert_array_equal(first[[2, 0, 1]], sampled(pair.flax, ids[[2, 0, 1]], mask[[2, 0, 1]], seed=11))
    assert (first != sampled(pair.flax, ids, mask, seed=12)).any()
    copies = sampled(pair.flax, np.repeat(ids[:1], 3, axis=0), seed=11)
    np.testing.assert_array_equal(copies[0], first[0])
    assert len({tuple(row) for row in copies}) == 3


def test_prng_key_draws_the_same_again_and_no_seed_draws_anew(pair):
    ids, _ = batch()
    key = jax.random.PRNGKey(4)
    np.testing.assert_array_equal(sampled(pair.flax, ids, prng_key=key), sampled(pair.flax, ids, prng_key=key))
    assert (sampled(pair.flax, ids) != sampled(pair.flax, ids)).any()
    with pytest.raises(InputError, match="seed and prng_key"):
        sampled(pair.flax, ids, prng_key=key, seed=1)


def test_samples_follow_the_processed_distribution(pair):
    """Chi-square of 3000 first tokens against PyTorch's processed probabilities: 5 sigma over its mean."""
    ids, _ = batch(rows=1)
    settings = dict(temperature=1.7, top_k=12, top_p=0.9)
    out = pair.torch.generate(as_torch(ids), max_new_tokens=1, do_sample=True, return_dict_in_generate=True,
                              output_scores=True, **settings)  # fmt: skip
    expected = out.scores[0][0].softmax(-1).numpy() * 3000
    tokens = sampled(pair.flax, np.repeat(ids, 3000, axis=0), max_new_tokens=1, seed=0, **settings)
    found = np.bincount(tokens[:, 0], minlength=160)
    kept = expected > 0
    assert 2 < kept.sum() <= 12
    assert not found[~kept].any()
    freedom = kept.sum() - 1
    assert ((found - expected)[kept] ** 2 / expected[kept]).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_min_p_and_several_results_a_prompt(pair):
    ids, mask = batch("left")
    out = sampled(pair.flax, ids, mask, min_p=0.2, num_return_sequences=2, seed=1)
    assert out.shape == (6, 8)
    assert (out[0] != out[1]).any()
    searched = sampled(pair.flax, ids, mask, num_beams=2, top_k=20, seed=1)
    assert searched.shape == (3, 8)


class Listener:
    def __init__(self, fail_at=None):
        self.heard, self.ended, self.fail_at = [], False, fail_at

    def put(self, value):
        if len(self.heard) == self.fail_at:
            raise KeyboardInterrupt
        self.heard.append(np.asarray(value).tolist())

    def end(self):
        self.ended = True


def test_a_streamer_hears_every_token_and_stops_the_loop(pair):
    ids, _ = batch(rows=1)
    settings = dict(max_new_tokens=9, eos_token_id=EOS)
    whole = np.asarray(pair.flax.generate(ids, **settings).sequences)
    listener = Listener()
    streamed = pair.flax.generate(ids, streamer=listener, **settings).sequences
    np.testing.assert_array_equal(streamed, whole)
    assert listener.heard == [ids.tolist(), *([token] for token in whole[0, 11:].tolist())]
    assert listener.ended
    stopped = Listener(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        pair.flax.generate(ids, streamer=stopped, **settings)
    assert stopped.heard == listener.heard[:3]
    assert stopped.ended
    with pytest.raises(InputError, match="one row"):
        pair.flax.generate(np.repeat(ids, 2, axis=0), streamer=Listener())


def test_inside_a_callers_jit_nothing_is_trimmed(pair):
    ids, mask = batch("left")
    eager = np.asarray(pair.flax.generate(ids, attention_mask=mask, max_new_tokens=6).sequences)

    @jax.jit
    def run(params, ids, mask):
        return pair.flax.generate(ids, attention_mask=mask, params=params, max_new_tokens=6).sequences

    np.testing.assert_array_equal(run(pair.flax.params, ids, mask), eager)


@pytest.mark.slow
def test_without_tracing_the_steps_run_one_by_one(pair):
    ids, _ = batch(rows=1)
    eager = np.asarray(pair.flax.generate(ids, max_new_tokens=2).sequences)
    np.testing.assert_array_equal(pair.flax.generate(ids, trace=False, max_new_tokens=2).sequences, eager)


def test_scanned_layers_and_adapters_generate(pair):
    from gemmakit.flax import init_lora, merge_lora

    ids, mask = batch("left")
    scanned = FlaxGemmaForCausalLM.from_pretrained(pair.folder, scan_layers=True)
    settings = dict(attention_mask=mask, max_new_tokens=6)
    expected = np.asarray(pair.flax.generate(ids, **settings).sequences)
    np.testing.assert_array_equal(scanned.generate(ids, **settings).sequences, expected)
    lora = jax.tree_util.tree_map(lambda x: x + 0.2, init_lora(pair.flax.params, 2, jax.random.PRNGKey(0)))
    adapted = np.asarray(scanned.generate(ids, lora=lora, **settings).sequences)
    merged = merge_lora(pair.flax.params, lora)
    assert (adapted != expected).any()
    np.testing.assert_array_equal(pair.flax.generate(ids, params=merged, **settings).sequences, adapted)


def test_without_a_prompt_the_row_starts_from_bos(pair):
    out = np.asarray(pair.flax.generate(max_new_tokens=4).sequences)
    assert out.shape == (1, 5)
    assert out[0, 0] == 2


def test_nan_in_the_weights_names_the_step(pair):
    broken = jax.tree_util.tree_map(lambda x: x * jnp.nan, pair.flax.params)
    ids, _ = batch()
    for settings in ({}, dict(do_sample=True), dict(num_beams=2)):
        with pytest.raises(NumericalError, match="step 1"):
            pair.flax.generate(ids, params=broken, max_new_tokens=6, **settings)


@pytest.mark.parametrize(("settings", "error", "words"), [
    (dict(penalty_alpha=0.6, top_k=4), GenerationConfigError, "contrastive search"),
    (dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0), GenerationConfigError, "group beam"),
    (dict(encoder_no_repeat_ngram_size=2), GenerationConfigError, "encoder_no_repeat_ngram_size is 2"),
    (dict(cache_implementation="quantized"), GenerationConfigError, "cache_implementation"),
    (dict(num_return_sequences=2), GenerationConfigError, "num_return_sequences is 2"),
    (dict(temprature=0.5), GenerationConfigError, "temperature"),
    (dict(temperature=-1.0), GenerationConfigError, "temperature"),
    (dict(max_new_tokens=250), PromptTooLong, "the context holds 256"),
    (dict(max_length=11), PromptTooLong, "max_length is 11"),
    (dict(eos_token_id=160), TokenOutOfRange, "160"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(pair, settings, error, words):
    ids, _ = batch()
    with pytest.raises(error, match=words):
        pair.flax.generate(ids, **settings)


def test_bad_prompts_are_refused(pair):
    ids, mask = batch("right")
    with pytest.raises(InputError, match="padded on the right"):
        pair.flax.generate(ids, attention_mask=mask)
    with pytest.raises(InputError, match="all padding"):
        pair.flax.generate(ids, attention_mask=mask * 0)
    with pytest.raises(TokenOutOfRange, match="160"):
        pair.flax.generate(ids + 160)
    with pytest.raises(InputError, match="attention_mask has shape"):
        pair.flax.generate(ids, attention_mask=mask[:, 1:])
    with pytest.warns(UserWarning, match="does not begin with <bos>"):
        pair.flax.generate(np.full((1, 3), 9), max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gqa", "mha"])
def test_greedy_tokens_in_other_shapes_and_deeper(tmp_path, shape):
    from tiny_shapes import SHAPES

    model = make_torch(**SHAPES[shape], num_hidden_layers=4, max_position_embeddings=256, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    ours = FlaxGemmaForCausalLM.from_pretrained(tmp_path)
    same_tokens(ours, model, *left_padded(prompts(20, 60)), max_new_tokens=40)


def demo_folder():
    from pathlib import Path

    folder = Path(gemmakit.__file__).parent / "demo"
    return folder if (folder / "config.json").is_file() else None


@pytest.mark.skipif(demo_folder() is None, reason="the demo model is not in this checkout")
def test_greedy_tokens_of_the_demo_model_are_pytorchs():
    """50 prompts, each alone and in left-padded batches."""
    folder = demo_folder()
    ours, oracle = FlaxGemmaForCausalLM.from_pretrained(folder), gemmakit.GemmaForCausalLM.from_pretrained(folder)
    oracle = oracle.float()
    tokenizer = gemmakit.GemmaTokenizerFast.from_pretrained(folder)
    texts = [f"{a} {b}" for a in WORDS for b in WORDS][:50]
    rows = [np.asarray([tokenizer(text).input_ids]) for text in texts]
    for row in rows[:10]:
        same_tokens(ours, oracle, row, None, max_new_tokens=16)
    for at in range(0, 50, 10):
        same_tokens(ours, oracle, *left_padded(rows[at : at + 10]), max_new_tokens=16)


WORDS = (
    "The yield statement",
    "What is",
    "A list",
    "In Python",
    "Return the",
    "def main",
    "3 + 4 =",
    "Once upon a time,",
)


def test_the_settings_of_gemma_3s_files_are_taken():
    sampled = dict(do_sample=True, top_k=64, top_p=0.95, eos_token_id=[1, 106], bos_token_id=2, pad_token_id=0)
    refuse_unsupported(gemmakit.GenerationConfig.from_dict({**sampled, "cache_implementation": "hybrid"}))
