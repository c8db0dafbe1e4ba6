"""Forward, backward and cached passes against the PyTorch backend, from a checkpoint that it saved.

FLOAT32 1e-5 is a share of the largest value: the same float32 operations, with sums of up to 96 terms in another order.
BFLOAT16: one step is 2^-8; a rounding that falls the other way in one layer moves what follows by a few steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax_tools import PADDING, apart, as_torch, batch, flat, labels_of, make_torch
from tiny_shapes import SHAPES

import gemmakit
from gemmakit.checkpoint.formats.msgpack import pytorch_name
from gemmakit.errors import ConfigError
from gemmakit.flax import FlaxGemmaForCausalLM, FlaxGemmaModel, stack_layers, unstack_layers
from gemmakit.flax.layers import rotary_tables

FLOAT32 = 1e-5
BFLOAT16 = 8 * 2**-8


def torch_run(model, ids, mask, **more):
    with torch.no_grad():
        return model(as_torch(ids), as_torch(mask), **more)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_losses_hidden_states_and_attentions_equal_pytorch(both, shape, padding):
    pair = both(shape, attention_bias=shape == "gqa")
    ids, mask = batch(padding)
    labels = labels_of(ids, mask)
    asked = dict(output_hidden_states=True, output_attentions=True)
    ours = pair.flax(ids, mask, labels=labels, **asked)
    theirs = torch_run(pair.torch, ids, mask, labels=as_torch(labels), **asked)
    assert apart(ours.logits, theirs.logits, mask) < FLOAT32
    assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-6)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert apart(mine, other, mask) < FLOAT32
    for mine, other in zip(ours.attentions, theirs.attentions, strict=True):
        assert apart(np.swapaxes(mine, 1, 2), other.transpose(1, 2), mask) < FLOAT32


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_attention_equals_pytorch(both, shape, padding):
    """Without weights asked for, jax.nn.dot_product_attention runs instead of the written-out form."""
    pair = both(shape, attention_bias=shape == "gqa")
    ids, mask = batch(padding)
    assert apart(pair.flax(ids, mask).logits, torch_run(pair.torch, ids, mask).logits, mask) < FLOAT32


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_close_to_pytorch_in_bfloat16(both, shape):
    folder = both(shape, attention_bias=shape == "gqa").folder
    half = FlaxGemmaForCausalLM.from_pretrained(folder, jnp.bfloat16, param_dtype=jnp.bfloat16)
    theirs = gemmakit.GemmaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for padding in ("left", "right"):
        ids, mask = batch(padding)
        logits = half(ids, mask).logits
        assert logits.dtype == jnp.bfloat16
        assert apart(logits, torch_run(theirs, ids, mask).logits, mask) < BFLOAT16


def test_bfloat16_is_as_near_to_float32_as_pytorch(both):
    """The tolerance above could hide a lost float32 step: the error against float32 may not be above PyTorch's."""
    pair = both("mqa")
    half = FlaxGemmaForCausalLM.from_pretrained(pair.folder, jnp.bfloat16, param_dtype=jnp.bfloat16)
    theirs = gemmakit.GemmaForCausalLM.from_pretrained(pair.folder, dtype=torch.bfloat16)
    errors = np.zeros(2)
    for seed in range(4):
        ids, mask = batch("left", seed=seed)
        truth = torch_run(pair.torch, ids, mask).logits.numpy()
        found = np.asarray(half(ids, mask).logits, np.float32), torch_run(theirs, ids, mask).logits.float().numpy()
        errors += [float((np.square(f - truth) * mask[..., None]).mean()) for f in found]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("shape", ["mqa", "gqa", pytest.param("mha", marks=pytest.mark.slow)])
def test_loss_and_every_gradient_equal_pytorch(both, shape, padding):
    pair = both(shape, attention_bias=True, tie_word_embeddings=shape != "mha")
    ids, mask = batch(padding)
    mask = np.ones_like(ids) if mask is None else mask
    labels = labels_of(ids, mask)
    pair.torch.zero_grad()
    out = pair.torch(as_torch(ids), as_torch(mask), labels=as_torch(labels), use_cache=False)
    out.loss.backward()

    def loss_of(params):
        return pair.flax(ids, mask, params=params, labels=labels).loss

    loss, gradients = jax.value_and_grad(loss_of)(pair.flax.params)
    assert float(loss) == pytest.approx(float(out.loss.detach()), rel=1e-6)
    theirs = dict(pair.torch.named_parameters())
    overall = max(float(p.grad.abs().max()) for p in theirs.values())
    assert len(flat(gradients)) == len(theirs)
    for path, gradient in flat(gradients).items():
        name, transposed = pytorch_name(path)
        other = theirs[name].grad.numpy()
        difference = np.abs((gradient.T if transposed else gradient) - other).max()
        # A key bias moves all scores of a query alike, so its exact gradient is 0: only the overall size can bound it.
        size = overall if name.endswith("k_proj.bias") else np.abs(other).max()
        assert difference <= FLOAT32 * overall, name
        assert difference <= 1e-4 * size, name  # small gradients are differences of larger sums


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_passes_equal_the_whole_and_pytorch(both, shape, padding):
    pair = both(shape, attention_bias=shape == "gqa")
    ids, mask = batch(padding)
    whole = torch_run(pair.torch, ids, mask).logits
    cache = pair.flax.init_cache(len(ids), 13)
    start = 0
    for size in (4, 1, 1, 4, 1):
        end = start + size
        seen = None if mask is None else np.pad(mask[:, :end], ((0, 0), (0, 13 - end)))  # one shape, one compilation
        out = pair.flax(ids[:, start:end], seen, past_key_values=cache)
        at = None if mask is None else mask[:, start:end]
        if at is None or at.any():
            assert apart(out.logits, whole[:, start:end], at) < FLOAT32
        cache, start = out.past_key_values, end
    assert int(cache["index"]) == ids.shape[1]


def test_a_mask_of_the_tokens_so_far_is_widened_to_the_cache(both):
    pair = both("mqa")
    ids, mask = batch("left")
    cache = pair.flax.init_cache(len(ids), 13)
    out = pair.flax(ids, mask, past_key_values=cache)
    assert apart(out.logits, torch_run(pair.torch, ids, mask).logits, mask) < FLOAT32


def test_scanned_layers_compute_the_same_from_the_same_names(both):
    pair = both("gqa", attention_bias=True)
    ids, mask = batch("left")
    scanned = FlaxGemmaForCausalLM.from_pretrained(pair.folder, scan_layers=True)
    assert flat(scanned.params).keys() == flat(pair.flax.params).keys()
    assert scanned.stored_params["model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape == (2, 48, 72)
    asked = dict(output_hidden_states=True, output_attentions=True)
    ours, theirs = scanned(ids, mask, **asked), pair.flax(ids, mask, **asked)
    assert apart(ours.logits, theirs.logits, mask) < 1e-6
    for mine, other in zip(
        (*ours.hidden_states, *ours.attentions), (*theirs.hidden_states, *theirs.attentions), strict=True
    ):
        np.testing.assert_allclose(mine, other, atol=2e-5)
    cache = scanned.init_cache(3, 12)
    assert apart(scanned(ids, mask, past_key_values=cache).logits, theirs.logits, mask) < 1e-6
    for stacked in (scanned.params, stack_layers(scanned.params)):  # either form goes to either model
        assert apart(pair.flax(ids, mask, params=stacked).logits, theirs.logits, mask) < 1e-6


def test_pruned_layers_have_the_heads_they_keep(tmp_path):
    model = make_torch(**SHAPES["gqa"])
    model.prune_heads({1: [0, 1, 2]})
    model.save_pretrained(tmp_path)
    ids, mask = batch("left")
    ours = FlaxGemmaForCausalLM.from_pretrained(tmp_path)
    assert apart(ours(ids, mask).logits, torch_run(model, ids, mask).logits, mask) < FLOAT32
    cache = ours.init_cache(3, 12)
    assert apart(ours(ids, mask, past_key_values=cache).logits, ours(ids, mask).logits, mask) < FLOAT32
    with pytest.raises(ConfigError, match="layers of one shape"):
        FlaxGemmaForCausalLM.from_pretrained(tmp_path, scan_layers=True)


def test_the_scanned_program_does_not_grow_with_depth():
    def size(layers, scan):
        config = gemmakit.GemmaConfig(vocab_size=8, intermediate_size=8, num_hidden_layers=layers, **SHAPES["mqa"])
        model = FlaxGemmaForCausalLM(config, _do_init=False, scan_layers=scan)
        shapes = jax.eval_shape(stack_layers, model.params_shape_tree) if scan else model.params_shape_tree
        lowered = jax.jit(lambda p, ids: model(ids, params=p).logits).lower(shapes, jnp.zeros((1, 4), jnp.int32))
        return lowered.as_text().count("\n")

    assert size(12, scan=True) == size(3, scan=True)
    assert size(12, scan=False) > 2 * size(3, scan=False)


def test_stacking_and_unstacking_are_inverse(both):
    params = both("gqa", attention_bias=True).flax.params
    again = flat(unstack_layers(stack_layers(params)))
    assert again.keys() == flat(params).keys()
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(again[path], leaf)


ROPES = {
    "default": dict(rope_theta=500.0),
    "linear": dict(factor=3.0),
    "dynamic": dict(factor=2.5),
    "yarn": dict(factor=4.0, original_max_position_embeddings=32),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    "longrope": dict(short_factor=[1.0 + i / 9 for i in range(8)], long_factor=[2.0 + i for i in range(8)],
                     original_max_position_embeddings=32),
}  # fmt: skip


@pytest.mark.parametrize("longest", [20, 200])
@pytest.mark.parametrize("kind", ROPES)
def test_rotary_tables_equal_pytorch(kind, longest):
    from gemmakit.pytorch.layers import GemmaRotaryEmbedding

    config = gemmakit.GemmaConfig(
        head_dim=16, max_position_embeddings=96, rope_parameters=dict(rope_type=kind, **ROPES[kind])
    )
    positions = np.stack([np.arange(longest - 12, longest), np.arange(12)])
    theirs = GemmaRotaryEmbedding(config)(torch.tensor(positions), torch.float32)
    ours = rotary_tables(config, jnp.asarray(positions), jnp.float32)
    for mine, other in zip(ours, theirs, strict=True):
        # An inverse frequency may differ in its last bit, 6e-8, which position 200 multiplies.
        np.testing.assert_allclose(mine, other.numpy(), atol=longest * 1.2e-7)


def test_bidirectional_packed_and_given_masks_equal_pytorch(both):
    pair = both("mqa")
    ids, mask = batch("right")
    cases = [dict(is_causal=False), dict(is_causal=False, attention_mask=mask)]
    cases.append(dict(position_ids=np.tile([0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3], (3, 1))))
    seen = np.random.default_rng(0).random((3, 1, 11, 11)) < 0.6
    seen[1, 0, 4] = False  # this query may look nowhere
    cases += [
        dict(attention_mask=seen),
        dict(attention_mask=np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)),
    ]
    for case in cases:
        theirs = pair.torch(as_torch(ids), **{k: v if isinstance(v, bool) else as_torch(v) for k, v in case.items()})
        assert apart(pair.flax(ids, **case).logits, theirs.logits) < FLOAT32, case.keys()


def test_a_query_that_may_look_nowhere_gets_zeros(both):
    pair = both("gqa")
    ids, mask = batch("left")
    for asked in ({}, {"output_attentions": True}):
        out = pair.flax(ids, mask, **asked)
        assert np.isfinite(out.logits).all()
    assert not np.asarray(out.attentions[0])[2, :, :7].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embedding_scale_is_rounded_to_the_dtype_of_the_weights(dtype):
    config = gemmakit.GemmaConfig(vocab_size=4, hidden_size=3072, intermediate_size=4, num_hidden_layers=1,
                                  num_attention_heads=1, num_key_value_heads=1, head_dim=2, pad_token_id=None,
                                  eos_token_id=None, bos_token_id=None)  # fmt: skip
    model = FlaxGemmaModel(config, dtype=jnp.float32)
    model.params = jax.tree_util.tree_map(lambda x: jnp.ones_like(x, dtype), model.params)
    first = model(np.zeros((1, 1), int), output_hidden_states=True).hidden_states[0]
    expected = {"float32": np.float32(3072**0.5), "bfloat16": 55.5, "float16": 55.4375}[dtype]
    assert float(first[0, 0, 0]) == expected


def test_a_callable_activation_and_changed_configuration_take_effect(both):
    pair = both("mqa")
    ids, _ = batch()
    before = np.asarray(pair.flax(ids).logits)
    pair.flax.config.hidden_act = jax.nn.relu
    changed = np.asarray(pair.flax(ids).logits)
    pair.flax.config.hidden_act = "gelu_pytorch_tanh"
    assert np.abs(changed - before).max() > 1e-2
    np.testing.assert_array_equal(pair.flax(ids).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu_erf", "relu", "silu"])
@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_wider_grid_equals_pytorch(tmp_path, shape, layers, activation):
    model = make_torch(
        **SHAPES[shape], num_hidden_layers=layers, hidden_act=activation, tie_word_embeddings=layers == 1
    )
    model.save_pretrained(tmp_path)
    ours = FlaxGemmaForCausalLM.from_pretrained(tmp_path, scan_layers=layers == 5)
    for padding in PADDING:
        ids, mask = batch(padding, width=23)
        assert apart(ours(ids, mask).logits, torch_run(model, ids, mask).logits, mask) < FLOAT32
