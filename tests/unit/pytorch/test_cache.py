"""What a cache promises: the older tuple form, cutting, choosing and repeating rows, copies, limits."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gemma import far, prompts, tiny

import gemmakit
from gemmakit.errors import InputError, PromptTooLong

EXACT = 2e-5  # as in test_model_laws


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny()


def filled(model, ids, kind="dynamic"):
    cache = gemmakit.DynamicCache() if kind == "dynamic" else gemmakit.StaticCache(model.config, max_cache_len=24)
    model(ids, past_key_values=cache)
    return cache


each_kind = pytest.mark.parametrize("kind", ["dynamic", "static"])


def test_a_tuple_in_gives_a_tuple_out(model):
    ids = prompts()
    legacy = model(ids[:, :5]).past_key_values.to_legacy_cache()
    before = copy.deepcopy(legacy)
    out = model(ids[:, 5:], past_key_values=legacy, use_cache=True)
    assert far(out.logits, model(ids).logits[:, 5:]) < EXACT
    assert isinstance(out.past_key_values, tuple)
    assert len(out.past_key_values) == model.config.num_hidden_layers
    for key, value in out.past_key_values:
        assert key.shape == value.shape == (2, 2, 9, 12)
    for mine, old in zip(legacy, before, strict=True):
        assert torch.equal(mine[0], old[0])
        assert torch.equal(mine[1], old[1])


@pytest.mark.parametrize("grad", [False, True])
def test_a_callers_tuple_is_never_written_to(model, grad):
    legacy = model(prompts()).past_key_values.to_legacy_cache()
    before = copy.deepcopy(legacy)
    with torch.set_grad_enabled(grad):
        cache = gemmakit.DynamicCache.from_legacy_cache(legacy)
    cache.crop(3)
    model(prompts(width=2), past_key_values=cache)
    for mine, old in zip(legacy, before, strict=True):
        assert torch.equal(mine[0], old[0])
        assert torch.equal(mine[1], old[1])


def test_the_cache_reads_like_the_tuple(model):
    cache = filled(model, prompts())
    assert len(cache) == 2
    legacy = cache.to_legacy_cache()
    for layer, (key, value) in enumerate(cache):
        assert torch.equal(key, cache[layer][0])
        assert torch.equal(value, legacy[layer][1])
    again = gemmakit.DynamicCache.from_legacy_cache(legacy)
    assert isinstance(again, gemmakit.DynamicCache)
    assert again.get_seq_length() == 9
    assert torch.equal(again[1][0], cache[1][0])


def test_an_empty_cache_is_true_has_no_layers_and_length_zero():
    cache = gemmakit.DynamicCache()
    assert cache
    assert len(cache) == cache.get_seq_length() == cache.nbytes == 0
    assert cache.to_legacy_cache() == ()
    assert cache.get_max_cache_shape() is None


@each_kind
@pytest.mark.parametrize("length", [0, 4, 9, 30, -2])
def test_cropping_forgets_the_end(model, kind, length):
    ids = prompts()
    cache = filled(model, ids, kind)
    cache.crop(length)
    kept = 7 if length == -2 else min(length, 9)
    assert cache.get_seq_length() == kept
    other = prompts(width=3, seed=7)
    whole = model(torch.cat((ids[:, :kept], other), 1)).logits[:, kept:]
    assert far(model(other, past_key_values=cache).logits, whole) < EXACT


@each_kind
def test_reset_starts_over_in_the_same_memory(model, kind):
    cache = filled(model, prompts(), kind)
    held, address = cache.nbytes, cache[0][0].data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    other = prompts(seed=8)
    assert far(model(other, past_key_values=cache).logits, model(other).logits) < EXACT
    assert (cache.nbytes, cache[0][0].data_ptr()) == (held, address)


@each_kind
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([2])), [2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_can_be_reordered_selected_and_repeated(model, kind, change, rows):
    ids = prompts(rows=3)
    cache = filled(model, ids[:, :6], kind)
    change(cache)
    got = model(ids[rows, 6:], past_key_values=cache).logits
    assert far(got, model(ids[rows]).logits[:, 6:]) < EXACT


@each_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(model, kind, copied):
    ids, other = prompts(), prompts(width=4, seed=5)
    cache = filled(model, ids, kind)
    twin = copied(cache)
    first = model(other, past_key_values=twin).logits
    assert cache.get_seq_length() == 9
    assert torch.equal(model(other, past_key_values=cache).logits, first)


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_a_growing_buffer_keeps_everything_and_wastes_at_most_half(steps):
    cache, keys = gemmakit.DynamicCache(), []
    for i, n in enumerate(steps):
        keys.append(torch.randn(1, 1, n, 2, generator=torch.Generator().manual_seed(i)))
        held, _ = cache.update(keys[-1], -keys[-1], 0)
        assert torch.equal(held, torch.cat(keys, 2))
    total = sum(steps)
    assert torch.equal(cache[0][1], -torch.cat(keys, 2))
    assert cache.nbytes <= 2 * 4 * 2 * max(64, total + total // 2)


def test_a_static_cache_takes_its_memory_once(model):
    cache = gemmakit.StaticCache(model.config, max_batch_size=2, max_cache_len=16, dtype=torch.float32)
    held, address = cache.nbytes, cache.layers[0]._keys.data_ptr()
    assert held == 2 * 2 * (2 * 2 * 16 * 12) * 4
    for i in range(9):
        model(prompts()[:, i : i + 1], past_key_values=cache)
    assert (cache.nbytes, cache.layers[0]._keys.data_ptr()) == (held, address)
    assert cache.get_max_cache_shape() == cache.max_cache_len == 16


def test_a_full_static_cache_refuses_with_the_size_that_fits(model):
    cache = gemmakit.StaticCache(model.config, max_cache_len=10)
    model(prompts(), past_key_values=cache)
    with pytest.raises(PromptTooLong, match=r"holds 10 tokens and has 9; 2 more.*max_cache_len=11"):
        model(prompts(width=2), past_key_values=cache)
    model(prompts(width=1), past_key_values=cache)
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("length", [0, -1, 1.5, "9"])
def test_a_static_cache_of_no_length_is_refused(model, length):
    with pytest.raises(InputError, match="max_cache_len is"):
        gemmakit.StaticCache(model.config, max_cache_len=length)


def test_another_batch_size_is_refused(model):
    cache = filled(model, prompts(rows=2))
    with pytest.raises(InputError, match="holds 2 rows and this call has 3"):
        model(prompts(rows=3), past_key_values=cache)


def test_passes_with_and_without_gradients_can_follow_each_other(model):
    ids, cache = prompts(), gemmakit.StaticCache(model.config, max_cache_len=12)
    parts = []
    for grad, piece in ((True, ids[:, :3]), (False, ids[:, 3:5]), (True, ids[:, 5:6])):
        with torch.set_grad_enabled(grad):
            parts.append(model(piece, past_key_values=cache).logits)
    parts.append(model(ids[:, 6:], past_key_values=cache, cache_position=torch.arange(6, 9)).logits)
    assert far(torch.cat(parts, 1), model(ids).logits) < EXACT


@each_kind
def test_a_cache_made_in_inference_mode_can_be_used_outside_it(model, kind):
    ids = prompts()
    with torch.inference_mode():
        cache = filled(model, ids[:, :5], kind)
    assert far(model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:]) < EXACT
