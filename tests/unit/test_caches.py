"""The caches beyond the growing one: static, offloaded, quantized, and caches in files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmakit import DynamicCache, GemmaConfig, GemmaForCausalLM, StaticCache
from gemmakit.errors import CheckpointError, InputError, PromptTooLong
from gemmakit.pytorch.cache import KINDS, new_cache
from gemmakit.pytorch.cache import files as cache_files
from gemmakit.pytorch.cache import offloaded as cache_offloaded
from gemmakit.pytorch.cache.offloaded import OffloadedCache
from gemmakit.pytorch.cache.quantized import FEATURES, POSITIONS, QuantizedCache, pack, unpack

LAYERS = 3
# float32 sums in another order.
CLOSE = dict(atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GemmaConfig(vocab_size=60, hidden_size=24, intermediate_size=32, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
                         initializer_range=0.2)  # fmt: skip
    return GemmaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def ids():
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 2
    return ids


def kinds(model):
    """Every kind of cache with room for 40 tokens; the quantized one keeps more exact than these tests have."""
    return {kind: new_cache(kind, model.config, 40) for kind in KINDS}


def stepped(model, ids, cache, first=6):
    """Logits of each position, the first ones in one pass and the others one by one."""
    out = [model(ids[:, :first], past_key_values=cache).logits]
    out += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(first, ids.shape[1])]
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_equal_one_pass(model, ids, kind):
    cache = kinds(model)[kind]
    torch.testing.assert_close(stepped(model, ids, cache), model(ids).logits, **CLOSE)
    assert cache.get_seq_length() == 24
    assert len(cache) == LAYERS
    assert cache.nbytes >= 24 * 2 * LAYERS * 2 * 2 * 8 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_crops_reorders_and_reads_as_a_tuple(model, ids, kind):
    cache = kinds(model)[kind]
    stepped(model, ids[:, :12], cache)
    cache.crop(8)
    cache.reorder_cache(torch.tensor([1, 0]))
    reference = DynamicCache()
    model(ids[[1, 0], :8], past_key_values=reference)
    for (k, v), (k2, v2) in zip(cache.to_legacy_cache(), reference.to_legacy_cache(), strict=True):
        torch.testing.assert_close(k, k2, **CLOSE)
        torch.testing.assert_close(v, v2, **CLOSE)
    got = model(ids[:, 8:10], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids[:, 8:10], past_key_values=reference).logits, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_of_every_kind_are_independent(model, ids, kind, copied):
    cache = kinds(model)[kind]
    model(ids[:, :9], past_key_values=cache)
    twin = copied(cache)
    first = model(ids[:, 9:12], past_key_values=twin).logits
    assert cache.get_seq_length() == 9 and twin.get_seq_length() == 12
    assert torch.equal(model(ids[:, 9:12], past_key_values=cache).logits, first)


@pytest.mark.parametrize("kind", KINDS)
def test_another_models_cache_is_refused(model, ids, kind):
    cache = kinds(model)[kind]
    cache.update(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8), 0)
    with pytest.raises(InputError, match=r"1 heads of 8 a layer and this model has 2 of 8"):
        model(ids, past_key_values=cache)


def test_unknown_kinds_and_settings_are_refused(model):
    with pytest.raises(InputError, match=r"no cache 'sliding'.*dynamic.*static"):
        new_cache("sliding", model.config, 8)
    with pytest.raises(InputError, match="quantized cache does not take 'bits'"):
        new_cache("quantized", model.config, 8, {"bits": 4})
    assert new_cache("quantized", model.config, 8, {"backend": "quanto", "nbits": 8}).nbits == 8
    with pytest.raises(InputError, match="nbits is 3"):
        QuantizedCache(nbits=3)
    with pytest.raises(InputError, match="q_group_size is 0"):
        QuantizedCache(q_group_size=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_takes_every_kind_by_name(model, ids, kind, strategy):
    prompt = dict(inputs=ids[:, :6], max_new_tokens=8, do_sample=False, **strategy)
    got = model.generate(**prompt, cache_implementation=kind, return_dict_in_generate=True)
    assert torch.equal(got.sequences, model.generate(**prompt))
    assert type(got.past_key_values) is type(new_cache(kind, model.config, 8))


def test_generate_hands_settings_to_the_cache(model, ids):
    settings = {"nbits": 8, "q_group_size": 4, "residual_length": 4}
    out = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="quantized",
                         cache_config=settings, return_dict_in_generate=True)  # fmt: skip
    cache = out.past_key_values
    assert (cache.nbits, cache.q_group_size, cache.residual_length) == (8, 4, 4)
    assert cache.layers[0].older is not None


def test_generate_continues_from_a_saved_prompt(model, ids, tmp_path):
    cache = DynamicCache()
    model(ids[:1, :9], past_key_values=cache)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = DynamicCache.load(tmp_path / "prompt.safetensors")
    got = model.generate(ids[:1, :12], past_key_values=loaded, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, model.generate(ids[:1, :12], max_new_tokens=5, do_sample=False))


# -- static -------------------------------------------------------------------------------------------------------


def test_places_by_tensor_equal_one_pass_and_keep_every_address(model, ids):
    cache = StaticCache(model.config, max_batch_size=2, max_cache_len=30, dtype=torch.float32)
    addresses = [(layer._keys.data_ptr(), layer._values.data_ptr()) for layer in cache.layers]
    out = [model(ids[:, :6], past_key_values=cache, cache_position=torch.arange(6)).logits]
    out += [
        model(ids[:, i : i + 1], past_key_values=cache, cache_position=torch.tensor([i])).logits for i in range(6, 24)
    ]
    torch.testing.assert_close(torch.cat(out, 1), model(ids).logits, **CLOSE)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.reset()
    model(ids[:, :3], past_key_values=cache)
    assert addresses == [(layer._keys.data_ptr(), layer._values.data_ptr()) for layer in cache.layers]


@pytest.mark.parametrize("kind", ["static", "offloaded_static"])
def test_a_full_cache_is_refused_with_both_counts(model, ids, kind):
    cache = new_cache(kind, model.config, 10)
    model(ids[:, :9], past_key_values=cache)
    with pytest.raises(PromptTooLong, match=r"holds 10 tokens and has 9; 2 more.*max_cache_len=11"):
        model(ids[:, 9:11], past_key_values=cache)


# -- offloaded ----------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator(monkeypatch):
    """Lets the CPU play the accelerator: what is held must be sent for, as from another device."""
    monkeypatch.setattr(cache_offloaded, "_at_home", lambda device: False)


@pytest.mark.usefixtures("accelerator")
def test_offloaded_steps_equal_one_pass_through_fetched_copies(model, ids):
    cache = OffloadedCache()
    torch.testing.assert_close(stepped(model, ids, cache), model(ids).logits, **CLOSE)
    cache.crop(20)
    cache.reorder_cache(torch.tensor([1, 0]))
    got = model(ids[[1, 0], 20:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids[[1, 0]]).logits[:, 20:], **CLOSE)


@pytest.mark.usefixtures("accelerator")
def test_at_most_two_layers_are_on_the_accelerator(model, ids, monkeypatch):
    cache, most = OffloadedCache(), []
    append = cache_offloaded.OffloadedLayer.append
    monkeypatch.setattr(
        cache_offloaded.OffloadedLayer, "append", lambda *a: (most.append(cache.device_nbytes), append(*a))[1]
    )
    stepped(model, ids, cache)
    layer = sum(t.nbytes for t in cache[0])
    assert 0 < max(most) <= 2 * layer
    assert cache.device_nbytes <= layer, "between steps only the first layer waits on the accelerator"


@pytest.mark.parametrize("length", [None, 40])
def test_what_is_copied_to_the_accelerator_lies_together(model, ids, length):
    # A piece with gaps would first be gathered on the host, and the copy would not run beside the computation.
    cache = OffloadedCache(max_cache_len=length)
    for change in (lambda: None, lambda: cache.reorder_cache(torch.tensor([1, 0])), lambda: cache.crop(3)):
        stepped(model, ids[:, :7], cache)
        change()
        for layer in cache.layers:
            assert layer.keys.permute(2, 0, 1, 3).is_contiguous() and layer.values.permute(2, 0, 1, 3).is_contiguous()


# -- quantized ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    along=st.sampled_from([POSITIONS, FEATURES]),
    groups=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4, 8]),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_packing_is_off_by_half_a_step_at_most(bits, along, groups, group, scale, seed):
    T, H = (groups * group, 8) if along == POSITIONS else (5, groups * group * 2)
    x = torch.randn(2, 3, T, H, generator=torch.Generator().manual_seed(seed)) * scale
    packed = pack(x, bits, group, along)
    step = packed.scale.expand(packed.scale.shape) if group > 1 else packed.scale
    error = (unpack(packed, torch.float32) - x).abs().unflatten(along, (-1, group))
    assert (error <= step * 0.5 + 1e-5 * scale).all()
    assert packed.data.nbytes == x.numel() * bits // 8


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_packing_a_constant_is_exact(value):
    x = torch.full((1, 1, 4, 8), value)
    assert torch.equal(unpack(pack(x, 4, 4, POSITIONS), torch.float32), x)


@pytest.mark.parametrize(("nbits", "allowed"), [(8, 0.02), (4, 0.3)])
def test_quantized_steps_stay_near_one_pass(model, ids, nbits, allowed):
    cache = QuantizedCache(nbits=nbits, q_group_size=4, residual_length=4)
    got, exact = stepped(model, ids, cache), model(ids).logits
    assert cache.layers[0]._packed_positions() == 20
    apart = (got - exact).abs().max() / exact.abs().max()
    # A step is 1 / 255 or 1 / 15 of a group's range, a few layers add up; 0 would mean that nothing is packed.
    assert 1e-6 < apart < allowed


def test_eight_bits_are_nearer_than_four(model, ids):
    exact = model(ids).logits
    errors = [
        (stepped(model, ids, QuantizedCache(nbits=n, q_group_size=4, residual_length=4)) - exact).abs().mean()
        for n in (4, 8)
    ]
    assert errors[1] < errors[0] / 4


def test_the_newest_positions_and_the_prompts_own_pass_are_exact(model, ids):
    cache, reference = QuantizedCache(q_group_size=4, residual_length=6), DynamicCache()
    a, b = model(ids, past_key_values=cache).logits, model(ids, past_key_values=reference).logits
    assert torch.equal(a, b)
    for (k, v), (k2, v2) in zip(cache, reference, strict=True):
        assert torch.equal(k[:, :, -6:], k2[:, :, -6:]) and torch.equal(v[:, :, -6:], v2[:, :, -6:])
        assert not torch.equal(k[:, :, :-6], k2[:, :, :-6])


@pytest.mark.parametrize("length", range(0, 25, 3))
def test_cropping_through_packed_groups_keeps_what_was_packed(model, ids, length):
    cache = QuantizedCache(q_group_size=4, residual_length=5)
    model(ids, past_key_values=cache)
    before = [(k[:, :, :length].clone(), v[:, :, :length].clone()) for k, v in cache]
    cache.crop(length)
    assert cache.get_seq_length() == length
    for pair, kept in zip(cache, before, strict=True):
        torch.testing.assert_close(pair, kept)
    cache.batch_repeat_interleave(2)
    assert model(ids[[0, 0, 1, 1], :3], past_key_values=cache).logits.shape[0] == 4
    assert cache.get_seq_length() == length + 3


@pytest.mark.parametrize(("nbits", "bytes_a_number"), [(4, 0.625), (8, 1.125)])
def test_memory_is_what_the_docstring_says(nbits, bytes_a_number):
    cache = QuantizedCache(nbits=nbits)
    k = torch.randn(1, 1, 1024 + 128, 256, dtype=torch.bfloat16)
    cache.update(k, k, 0)
    recent = 2 * 128 * 256 * 2
    assert cache.nbytes - recent == 2 * 1024 * 256 * bytes_a_number
    assert cache[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["offloaded", "quantized"])
def test_caches_without_gradients_say_so(model, ids, kind):
    with torch.enable_grad(), pytest.raises(InputError, match="keeps no gradients: use DynamicCache"):
        model(ids, past_key_values=new_cache(kind, model.config))


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_continues_where_it_stood(model, ids, kind, tmp_path):
    cache = kinds(model)[kind]
    model(ids[:, :10], past_key_values=cache)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = DynamicCache.load(tmp_path / "prompt.safetensors")
    assert isinstance(loaded, DynamicCache) and loaded.get_seq_length() == 10
    got = model(ids[:, 10:], past_key_values=loaded).logits
    torch.testing.assert_close(got, model(ids).logits[:, 10:], **CLOSE)


def test_half_formats_survive_a_file(tmp_path):
    k = torch.randn(1, 2, 3, 4).bfloat16()
    DynamicCache([(k, -k)]).save(tmp_path / "c")
    assert torch.equal(QuantizedCache.load(tmp_path / "c")[0][1], -k)


def test_a_failed_save_leaves_the_older_file_and_no_other(model, ids, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    cache = DynamicCache()
    model(ids[:, :4], past_key_values=cache)
    cache.save(path)

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(cache_files, "save_file", full)
    model(ids[:, 4:8], past_key_values=cache)
    with pytest.raises(CheckpointError, match=r"No space left.*untouched"):
        cache.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    assert DynamicCache.load(path).get_seq_length() == 4


def test_what_is_no_cache_is_refused(model, ids, tmp_path):
    with pytest.raises(InputError, match="empty"):
        DynamicCache().save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="is no file"):
        DynamicCache.load(tmp_path / "absent")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no cache"):
        DynamicCache.load(tmp_path / "model.safetensors")
    (tmp_path / "bad").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(CheckpointError):
        DynamicCache.load(tmp_path / "bad")


def test_layers_that_are_told_the_same_places_share_their_length():
    """One addition a pass on the device, not one a layer; and never an older one."""
    config = GemmaConfig(num_hidden_layers=3)
    cache, places = StaticCache(config, max_cache_len=12), torch.tensor([0])
    for length in (1, 2, 3):
        for layer in range(3):
            cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), layer, {"cache_position": places})
        assert cache.layers[0].length is cache.layers[1].length is cache.layers[2].length
        places += 1  # in place, as a captured step does
        assert [cache.get_seq_length(i) for i in range(3)] == [length] * 3
    cache.crop(1)
    assert [cache.get_seq_length(i) for i in range(3)] == [1] * 3
    for layer in range(3):
        cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), layer)
    assert [cache.get_seq_length(i) for i in range(3)] == [3] * 3
