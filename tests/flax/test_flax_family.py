"""Every member of the family against the PyTorch backend: windows, caps, four norms, norms of q and k, two rotations.

The window is 5 and texts are several of it long. FLOAT32 as in test_flax_parity.py; a cap's tanh and the norms of q and
k are a few operations more, on values that they bound. Gemma 4's layers here are one more, add to the stream three
times each, and some rows nearly cancel before a norm: there either backend may be 1e-5 off its own float64. BFLOAT16:
its few steps of 2^-8 for one layer more, and two roundings of a cap; twice that for Gemma 4, whose scores are not
scaled down, so that a rounded one moves its weight by more.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax_tools import ALIKE, MEMBERS, PADDING, WINDOW, apart, as_torch, batch, flat, labels_of, make_torch
from tiny_shapes import SHAPES

import gemmakit
from gemmakit.checkpoint.formats.msgpack import flax_path, pytorch_name
from gemmakit.errors import ConfigError, GemmakitError
from gemmakit.flax import FlaxGemmaForCausalLM, FlaxGemmaModel, init_lora, merge_lora
from gemmakit.flax.masks import visibility
from gemmakit.flax.weights import nested

FLOAT32 = dict.fromkeys(MEMBERS, 1e-5) | {"gemma4": 4e-5}
BFLOAT16 = dict.fromkeys(MEMBERS, 16 * 2**-8) | {"gemma4": 32 * 2**-8}
WIDTH = 23

CAUSAL = ("gemma2", "gemma3", "vaultgemma", "gemma4")
NAMES = {
    "gemma2": "FlaxGemma2",
    "gemma3": "FlaxGemma3",
    "vaultgemma": "FlaxVaultGemma",
    "embeddinggemma": "FlaxGemma3",
    "gemma4": "FlaxGemma4",
}


@pytest.fixture
def member(both):
    """(member, shape) -> the same weights in both backends, by way of a folder that PyTorch saved."""
    return lambda name, shape="gqa": both(shape, **MEMBERS[name])


def torch_run(model, ids, mask=None, **more):
    with torch.no_grad():
        return model(as_torch(ids), as_torch(mask), **more)


GRID = [("gqa", padding) for padding in PADDING] + [("mqa", "left"), ("mha", "left")]
CASES = [
    pytest.param(name, *case, marks=pytest.mark.slow if name == "gemma4" and case[0] == "mha" else ())
    for name in MEMBERS
    for case in GRID
]


@pytest.mark.parametrize(("name", "shape", "padding"), CASES)
def test_logits_losses_hidden_states_and_attentions_equal_pytorch(member, name, shape, padding):
    pair = member(name, shape)
    ids, mask = batch(padding, width=WIDTH)
    labels = labels_of(ids, mask)
    asked = dict(output_hidden_states=True, output_attentions=True)
    ours = pair.flax(ids, mask, labels=labels, **asked)
    theirs = torch_run(pair.torch, ids, mask, labels=as_torch(labels), **asked)
    assert apart(ours.logits, theirs.logits, mask) < FLOAT32[name]
    assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-6)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == MEMBERS[name]["num_hidden_layers"] + 1
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert apart(mine, other, mask) < FLOAT32[name]
    for mine, other in zip(ours.attentions, theirs.attentions, strict=True):
        assert apart(np.swapaxes(mine, 1, 2), other.transpose(1, 2), mask) < FLOAT32[name]
    fused = pair.flax(ids, mask).logits  # the form that keeps no weights
    assert apart(fused, theirs.logits, mask) < FLOAT32[name]


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_steps_through_a_cache_equal_the_whole_pass(member, name, padding):
    pair = member(name)
    ids, mask = batch(padding, width=WIDTH)
    whole = torch_run(pair.torch, ids, mask).logits
    cache, start, room = pair.flax.init_cache(len(ids), WIDTH + 4), 0, WIDTH + 4
    for size in (9, 1, 1, 1, 3, 1, 1, 1, 1, 3, 1):
        end = start + size
        seen = None if mask is None else np.pad(mask[:, :end], ((0, 0), (0, room - end)))
        out = pair.flax(ids[:, start:end], seen, past_key_values=cache)
        at = None if mask is None else mask[:, start:end]
        assert apart(out.logits, whole[:, start:end], at) < FLOAT32[name]
        cache, start = out.past_key_values, end
    assert int(cache["index"]) == WIDTH


def test_a_step_reads_no_more_keys_than_its_window():
    told = dict(batch=1, keys=100, past=jnp.int32(60), causal=True, position_ids=None, window=WINDOW)
    for queries in (1, 4):
        seen = visibility(None, queries=queries, **told)
        assert seen.mask.shape[-1] == WINDOW + queries - 1
        keys = seen.of(jnp.arange(100.0).reshape(1, 1, 100, 1))
        assert keys.ravel().tolist() == list(range(60 - WINDOW + 1, 60 + queries))
    first = visibility(None, queries=1, **{**told, "past": jnp.int32(2)})  # what is not written yet stays hidden
    assert first.mask.ravel().tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_beams_and_streams_are_pytorchs_past_several_windows(member, name):
    pair = member(name)
    ids, mask = batch("left", width=WIDTH)
    for settings in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 5 * WINDOW, "eos_token_id": None, **settings}
        with torch.no_grad():
            theirs = pair.torch.generate(as_torch(ids), attention_mask=as_torch(mask), **settings).numpy()
        ours = np.asarray(pair.flax.generate(ids, attention_mask=mask, **settings).sequences)
        np.testing.assert_array_equal(ours, theirs)
    lone = ids[:1]
    settings = {"max_new_tokens": 3 * WINDOW, "eos_token_id": None}
    tokens = [event.token for event in pair.flax.stream(lone, **settings)]
    assert tokens == np.asarray(pair.flax.generate(lone, **settings).sequences)[0, WIDTH:].tolist()


@pytest.mark.parametrize("name", CAUSAL)
def test_left_padding_and_neighbours_do_not_change_a_rows_tokens(member, name):
    pair = member(name)
    ids, mask = batch("left", width=WIDTH)
    settings = {"max_new_tokens": 2 * WINDOW, "eos_token_id": None}
    together = np.asarray(pair.flax.generate(ids, attention_mask=mask, **settings).sequences)[:, WIDTH:]
    for row, tokens in enumerate(together):
        alone = pair.flax.generate(ids[row : row + 1, mask[row] == 1], **settings).sequences
        np.testing.assert_array_equal(np.asarray(alone)[0, -2 * WINDOW :], tokens)


@pytest.mark.parametrize("name", MEMBERS)
def test_bfloat16_is_close_to_pytorchs_and_as_near_to_float32(member, name):
    """The tolerance alone could hide a lost float32 step: the error against float32 may not be above PyTorch's."""
    pair = member(name)
    half = FlaxGemmaForCausalLM.from_pretrained(pair.folder, jnp.bfloat16, param_dtype=jnp.bfloat16)
    theirs = gemmakit.AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.bfloat16)
    errors = np.zeros(2)
    for seed in range(3):
        ids, mask = batch("left", width=WIDTH, seed=seed)
        truth = torch_run(pair.torch, ids, mask).logits.numpy()
        logits, others = half(ids, mask).logits, torch_run(theirs, ids, mask).logits
        assert logits.dtype == jnp.bfloat16
        assert apart(logits, others, mask) < BFLOAT16[name]
        found = np.asarray(logits, np.float32), others.float().numpy()
        errors += [float((np.square(f - truth) * mask[..., None]).mean()) for f in found]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma4"])
def test_a_stream_too_large_for_float16_is_carried_scaled(tmp_path, name):
    """Norms of 30,000 on what enters the stream: unscaled it would pass 65,504.

    2^-6: a few roundings of 2^-11 a layer, of which the farthest logit adds up as many as the processor's sums have;
    2^-4 where scores are not scaled down.
    """
    model = make_torch(**SHAPES["gqa"], **MEMBERS[name])
    with torch.no_grad():
        for at, parameter in model.named_parameters():
            if "post_" in at:
                parameter.mul_(3e4)
            if "per_layer_input_gate" in at:  # what it gives passes the largest number in any scale
                parameter.mul_(1e-4)
    model.save_pretrained(tmp_path)
    half = FlaxGemmaForCausalLM.from_pretrained(tmp_path, jnp.float16)
    ids, mask = batch("left", width=WIDTH)
    out = half(ids, mask, output_hidden_states=True)
    truth = torch_run(model, ids, mask, output_hidden_states=True)
    assert float(truth.hidden_states[-2].abs().max()) > 65504
    assert apart(out.logits, truth.logits, mask) < (2**-4 if name == "gemma4" else 2**-6)


@pytest.mark.parametrize("name", MEMBERS)
def test_loss_and_every_gradient_equal_pytorch(member, name):
    pair = member(name)
    ids, mask = batch("left", width=WIDTH)
    labels = labels_of(ids, mask)
    pair.torch.zero_grad()
    pair.torch(as_torch(ids), as_torch(mask), labels=as_torch(labels), use_cache=False).loss.backward()
    gradients = jax.grad(lambda p: pair.flax(ids, mask, params=p, labels=labels).loss)(pair.flax.params)
    theirs = dict(pair.torch.named_parameters())
    overall = max(float(p.grad.abs().max()) for p in theirs.values())
    gradients = flat(gradients)
    scalars = [gradients.pop(path) for path in [*gradients] if path.endswith("layer_scalar")]
    assert not any(map(np.any, scalars))  # in PyTorch a buffer
    assert len(gradients) == len(theirs)
    for path, gradient in gradients.items():
        at, transposed = pytorch_name(path)
        other = theirs[at].grad.numpy()
        difference = np.abs((gradient.T if transposed else gradient) - other).max()
        assert difference <= FLOAT32[name] * min(overall, 10 * np.abs(other).max()), at


def test_recomputed_layers_that_share_keys_give_the_same_gradients(member):
    pair = member("gemma4")
    ids, mask = batch("left", width=WIDTH)
    labels = labels_of(ids, mask)

    def gradients(model):
        return jax.grad(lambda p: model(ids, mask, params=p, labels=labels).loss)(pair.flax.params)

    again = type(pair.flax)(pair.flax.config, _do_init=False, gradient_checkpointing=True)
    ours, theirs = flat(gradients(again)), flat(gradients(pair.flax))
    overall = max(float(np.abs(leaf).max()) for leaf in theirs.values())
    for path, leaf in theirs.items():
        assert np.abs(np.asarray(ours[path]) - np.asarray(leaf)).max() <= FLOAT32["gemma4"] * overall, path


@pytest.mark.parametrize("name", MEMBERS)
def test_scanned_layers_compute_the_same(both, name):
    pair = both("gqa", **ALIKE[name])
    ids, mask = batch("left", width=WIDTH)
    scanned = FlaxGemmaForCausalLM.from_pretrained(pair.folder, scan_layers=True)
    for seen in (mask, None):
        ours = scanned(ids, seen, output_hidden_states=True)
        theirs = pair.flax(ids, seen, output_hidden_states=True)
        assert apart(ours.logits, theirs.logits, seen) < FLOAT32[name]
        assert apart(ours.hidden_states[2], theirs.hidden_states[2], seen) < FLOAT32[name]
    if name in CAUSAL:
        settings = dict(attention_mask=mask, max_new_tokens=2 * WINDOW, eos_token_id=None)
        np.testing.assert_array_equal(
            scanned.generate(ids, **settings).sequences, pair.flax.generate(ids, **settings).sequences
        )


@pytest.mark.parametrize("name", MEMBERS)
def test_packed_bidirectional_and_given_masks_equal_pytorch(member, name):
    pair = member(name)
    ids, mask = batch("right", width=WIDTH)
    seen = np.random.default_rng(0).random((3, 1, WIDTH, WIDTH)) < 0.6
    seen[1, 0, 4] = False  # this query may look nowhere
    cases = [dict(attention_mask=seen), dict(is_causal=False), dict(is_causal=False, attention_mask=mask)]
    cases.append(dict(position_ids=np.tile([*range(9), *range(14)], (3, 1)), is_causal=True))
    for case in cases:
        given = {k: v if isinstance(v, bool) else as_torch(v) for k, v in case.items()}
        with torch.no_grad():
            theirs = pair.torch(as_torch(ids), **given).logits
        at = mask if case.get("attention_mask") is mask else None
        assert apart(pair.flax(ids, **case).logits, theirs, at) < FLOAT32[name], case.keys()


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_classification_heads_equal_pytorch_and_travel_back(tmp_path, name, head):
    before = make_torch(head, **SHAPES["mqa"], **MEMBERS[name], num_labels=3)
    before.save_pretrained(tmp_path / "pytorch")
    ours = getattr(gemmakit, f"FlaxGemmaFor{head}").from_pretrained(tmp_path / "pytorch")
    assert type(ours).__name__ == f"Flax{type(before).__name__}"
    ids, mask = batch("left", width=WIDTH)
    at = mask if head.startswith("Token") else None
    assert apart(ours(ids, mask).logits, torch_run(before, ids, mask).logits, at) < FLOAT32[name]
    ours.save_pretrained(tmp_path / "flax")
    after = getattr(gemmakit, f"AutoModelFor{head}").from_pretrained(tmp_path / "flax")
    assert type(after) is type(before)
    for at, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[at], tensor), at


@pytest.mark.parametrize("name", MEMBERS)
def test_classes_follow_the_model_type_and_weights_come_back_the_same(member, tmp_path, name):
    pair = member(name)
    assert type(pair.flax) is getattr(gemmakit, f"{NAMES[name]}ForCausalLM")
    assert isinstance(pair.flax, FlaxGemmaForCausalLM)
    bare = FlaxGemmaModel.from_pretrained(pair.folder)
    ids, _ = batch(width=WIDTH)
    assert apart(bare(ids).last_hidden_state, torch_run(pair.torch.model, ids).last_hidden_state) < FLOAT32[name]
    for safe in (True, False):
        pair.flax.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        again = FlaxGemmaForCausalLM.from_pretrained(tmp_path / str(safe))
        assert type(again) is type(pair.flax)
        assert again.config == pair.torch.config
        for path, leaf in flat(pair.flax.params).items():
            np.testing.assert_array_equal(flat(again.params)[path], leaf)
    fresh = type(pair.flax)(pair.flax.config)
    assert flat(fresh.params).keys() == flat(pair.flax.params).keys()


@pytest.mark.parametrize("name", MEMBERS)
def test_names_of_parameters_and_of_tensors_are_each_others(member, name):
    pair = member(name)
    stored = dict(map(pytorch_name, flat(pair.flax.params)))
    assert stored.keys() == pair.torch.state_dict().keys() - {"lm_head.weight"}
    for path in flat(pair.flax.params):
        tensor, transposed = pytorch_name(path)
        assert flax_path(tensor) == (path, transposed)


def test_another_members_class_is_refused_by_name(member):
    with pytest.raises(ConfigError, match="use FlaxGemma2ForCausalLM"):
        gemmakit.FlaxVaultGemmaForCausalLM.from_pretrained(member("gemma2").folder)
    with pytest.raises(ConfigError, match="use FlaxGemma3TextModel"):
        gemmakit.FlaxGemma2Model(gemmakit.Gemma3TextConfig(), _do_init=False)


def test_what_compiled_code_cannot_run_is_refused(member):
    config = member("gemma4").flax.config
    with pytest.raises(ConfigError, match="layers of one shape"):
        FlaxGemmaForCausalLM.from_pretrained(member("gemma4").folder, scan_layers=True)
    fewer = gemmakit.Gemma4TextConfig.from_dict({**config.to_dict(), "vocab_size_per_layer_input": 159})
    with pytest.raises(ConfigError, match="vocab_size_per_layer_input is 159 and vocab_size 160"):
        gemmakit.FlaxGemma4ForCausalLM(fewer, _do_init=False)
    mixed = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=8)
    with pytest.raises(ConfigError, match="4 experts in each layer"):
        gemmakit.FlaxGemma4ForCausalLM(gemmakit.Gemma4TextConfig.from_dict({**config.to_dict(), **mixed}))


def test_adapters_merge_and_every_tensor_is_needed(member, tmp_path):
    pair = member("gemma3")
    ids, mask = batch("left", width=WIDTH)
    lora = jax.tree_util.tree_map(lambda x: x + 0.2, init_lora(pair.flax.params, 2, jax.random.PRNGKey(0)))
    adapted = pair.flax(ids, mask, lora=lora).logits
    merged = pair.flax(ids, mask, params=merge_lora(pair.flax.params, lora)).logits
    assert apart(merged, adapted, mask) < FLOAT32["gemma3"]
    assert apart(pair.flax(ids, mask).logits, adapted, mask) > 1e-2
    with pytest.raises(GemmakitError, match="q_norm"):
        pair.flax.params = nested({at: leaf for at, leaf in flat(pair.flax.params).items() if "q_norm" not in at})
