"""jit, grad, vmap, recomputed layers, and optax on a small real task: full and LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax_tools import apart, batch, flat
from tiny_shapes import SHAPES

import gemmakit
from gemmakit.errors import InputError
from gemmakit.flax import FlaxGemmaForCausalLM, init_lora, merge_lora, stack_layers

ALPHABET = 24


def sorting(rng, rows=32, length=5):
    """<bos>, letters, a bar, the same letters sorted; the loss is on the sorted half."""
    letters = rng.integers(4, ALPHABET - 1, (rows, length))
    bar = np.full((rows, 1), ALPHABET - 1)
    ids = np.concatenate([np.full((rows, 1), 2), letters, bar, np.sort(letters, axis=1)], axis=1)
    labels = ids.copy()
    labels[:, : length + 2] = -100
    return ids, labels


@pytest.fixture(scope="module")
def learner():
    config = gemmakit.GemmaConfig(vocab_size=ALPHABET, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=1, head_dim=8)  # fmt: skip
    return FlaxGemmaForCausalLM(config, seed=0)


def train(loss_of, trainable, steps, rate):
    optimizer = optax.adam(rate)

    @jax.jit
    def step(trainable, state, ids, labels):
        loss, gradients = jax.value_and_grad(loss_of)(trainable, ids, labels)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trainable, updates), state, loss

    state, rng, losses = optimizer.init(trainable), np.random.default_rng(0), []
    for _ in range(steps):
        trainable, state, loss = step(trainable, state, *sorting(rng))
        losses.append(float(loss))
    return trainable, losses


def test_full_training_learns_to_sort_and_lora_adapts_it(learner):
    full, losses = train(lambda p, ids, labels: learner(ids, params=p, labels=labels).loss, learner.params, 250, 4e-3)
    assert losses[0] > 2.5
    assert np.mean(losses[-20:]) < 0.35 * losses[0]
    # Now the other way round: only the adapters move.
    before = {path: np.asarray(leaf) for path, leaf in flat(full).items()}
    lora = init_lora(full, 4, jax.random.PRNGKey(1), targets=("q_proj", "v_proj", "down_proj"))

    def reversed_loss(lora, ids, labels):
        turned = jnp.concatenate([ids[:, :7], ids[:, :6:-1]], axis=1)
        return learner(turned, params=full, labels=jnp.where(labels < 0, -100, turned), lora=lora).loss

    trained, losses = train(reversed_loss, lora, 80, 1e-2)
    assert np.mean(losses[-10:]) < 0.6 * losses[0]
    for path, leaf in flat(full).items():
        np.testing.assert_array_equal(leaf, before[path])
    ids, _ = sorting(np.random.default_rng(9))
    merged = merge_lora(full, trained)
    assert apart(learner(ids, params=merged).logits, learner(ids, params=full, lora=trained).logits) < 1e-5


def test_fresh_adapters_change_nothing_and_bad_ones_are_refused(learner):
    ids, _ = sorting(np.random.default_rng(0), rows=3)
    lora = init_lora(learner.params, 2, jax.random.PRNGKey(0))
    assert {path.split("/")[-2] for path in flat(lora)} == {"q_proj", "v_proj"}
    assert apart(learner(ids, lora=lora).logits, learner(ids).logits) == 0.0
    for rank, targets in ((0, ("q_proj",)), (2, ("norm",)), (2, ())):
        with pytest.raises(InputError, match="LoRA of rank"):
            init_lora(learner.params, rank, jax.random.PRNGKey(0), targets=targets)


@pytest.mark.parametrize("scan", [False, True])
def test_recomputed_layers_give_the_same_gradients(learner, scan):
    ids, labels = sorting(np.random.default_rng(0), rows=3)
    found = {}
    for remat in (False, True):
        model = FlaxGemmaForCausalLM(learner.config, _do_init=False, scan_layers=scan, gradient_checkpointing=remat)
        params = stack_layers(learner.params) if scan else learner.params
        found[remat] = flat(jax.grad(lambda p, m=model: m(ids, params=p, labels=labels).loss)(params))
    for path, gradient in found[False].items():
        np.testing.assert_allclose(found[True][path], gradient, atol=1e-6)


def test_vmap_over_models_equals_one_after_another(both):
    pair = both("mqa")
    ids, mask = batch("left")
    two = jax.tree_util.tree_map(lambda x: jnp.stack([x, 0.9 * x]), pair.flax.params)
    together = jax.vmap(lambda p: pair.flax(ids, mask, params=p).logits)(two)
    for i in range(2):
        alone = pair.flax(ids, mask, params=jax.tree_util.tree_map(lambda x, i=i: x[i], two)).logits
        assert apart(together[i], alone, mask) < 1e-5


def test_attention_dropout_acts_in_training_alone():
    config = gemmakit.GemmaConfig(vocab_size=40, num_hidden_layers=1, intermediate_size=8, attention_dropout=0.5,
                                  **SHAPES["mqa"])  # fmt: skip
    model = FlaxGemmaForCausalLM(config)
    ids = np.random.default_rng(0).integers(4, 40, (2, 9))
    still = np.asarray(model(ids).logits)
    key = jax.random.PRNGKey(0)
    dropped = np.asarray(model(ids, train=True, dropout_rng=key).logits)
    assert np.abs(dropped - still).max() > 1e-4
    np.testing.assert_array_equal(dropped, model(ids, train=True, dropout_rng=key).logits)
