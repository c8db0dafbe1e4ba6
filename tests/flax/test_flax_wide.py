"""Weights of 16 bits on a CPU: what products read of them is made wide once a call, and changes no result."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_tools import apart, batch, flat

from gemmakit.checkpoint import memory
from gemmakit.errors import NotEnoughMemory
from gemmakit.flax import FlaxGemmaForCausalLM, init_lora
from gemmakit.flax.decode import generate, step
from gemmakit.flax.layers import rows_of
from gemmakit.flax.weights import widened

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators multiply 16 bits: run on a CPU")

DTYPES = [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def stored(both):
    """(param_dtype, dtype, more) -> a model of the same weights, its head tied or not."""

    def make(param_dtype, dtype="float32", tied=True, **more):
        folder = both("mqa", max_position_embeddings=256, tie_word_embeddings=tied).folder
        return FlaxGemmaForCausalLM.from_pretrained(folder, dtype, param_dtype=param_dtype, **more)

    return make


def wide_of(model, params=None):
    return widened(model.stored_params if params is None else params, model.dtype, model.config.tie_word_embeddings)


@pytest.mark.parametrize(("param_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_products_read_is_wide_and_nothing_else(stored, param_dtype, dtype, tied):
    model = stored(param_dtype, dtype, tied)
    params = flat(model.params)
    head = "model/embed_tokens/embedding" if tied else "lm_head/kernel"
    found = flat(wide_of(model))
    assert set(found) == {path for path in params if path.endswith("_proj/kernel")} | {head}
    for path, leaf in found.items():
        assert leaf.dtype == jnp.float32, path
        np.testing.assert_array_equal(leaf, params[path].astype(dtype).astype("float32"), path)
    assert {str(leaf.dtype) for leaf in params.values()} == {param_dtype}


def test_nothing_is_copied_where_all_is_wide(stored):
    assert wide_of(stored("float32")) == {}


@pytest.mark.parametrize(("param_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("more", [{}, {"tied": False}, {"scan_layers": True}])
def test_logits_are_those_of_the_stored_weights(stored, param_dtype, dtype, more):
    """To what another order of float32 sums costs; in 16 bits a number near the middle may fall to either side."""
    model = stored(param_dtype, dtype, **more)
    ids, mask = batch("left")
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    given = model.variables()
    without = model.module.apply(given, ids, mask, positions).logits
    given["wide"] = wide_of(model)
    assert apart(model.module.apply(given, ids, mask, positions).logits, without, mask) < (
        1e-5 if dtype == "float32" else 2**-5
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 3}, {"num_beams": 2}])
@pytest.mark.parametrize("more", [{}, {"tied": False}, {"scan_layers": True}])
def test_tokens_are_those_of_the_stored_weights(stored, monkeypatch, rows, settings, more):
    model = stored("bfloat16", **more)
    ids, mask = batch("left" if rows > 1 else "none", rows=rows)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, init_lora(model.params, rank=2, rng=jax.random.key(0)))
    asked = dict(attention_mask=mask, max_new_tokens=12, eos_token_id=None, lora=lora, **settings)
    wide = model.generate(ids, **asked).sequences
    monkeypatch.setattr(generate, "widened", lambda *_: {})
    np.testing.assert_array_equal(wide, model.generate(ids, **asked).sequences)


def test_a_stream_makes_them_wide_once(stored, monkeypatch):
    calls = []
    monkeypatch.setattr(generate, "widened", lambda *given: calls.append(given) or widened(*given))
    ids, _ = batch(rows=1)
    assert len([*stored("bfloat16").stream(ids, max_new_tokens=6, eos_token_id=None)]) == 6
    assert len(calls) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_entering_the_loop_makes_nothing_of_a_weights_size(stored, tied, dtype):
    """A stream enters it for each token. Made of nothing but the stored weights, the same check finds something."""
    model = stored("bfloat16", dtype, tied)
    call = model._checked(batch(rows=1)[0], None, max_new_tokens=6, eos_token_id=None)
    shapes = {tuple(leaf.shape) for leaf in flat(model.params).values() if leaf.ndim > 1}
    shapes |= {shape[::-1] for shape in shapes}
    assert not made_ahead(call) & shapes
    del call.given.variables["wide"]
    assert made_ahead(call) & shapes


def made_ahead(call):
    """The shapes of what the compiled loop's caller computes."""
    state = jax.eval_shape(lambda given, cache: step.begin(*call.code, given, cache), call.given, call.cache)
    code = step.go_on.lower(*call.code, call.given, state, call.given.knobs["limit"]).compile().as_text()
    made = r"= \w+\[([\d,]+)\]\S* (?:fusion|convert|copy|transpose|bitcast-convert)\("
    made = re.findall(made, code.split("ENTRY")[1])
    return {tuple(map(int, dims.split(","))) for dims in made}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_of_a_table_and_their_derivatives_are_those_of_indexing(dtype):
    table = jax.random.normal(jax.random.key(0), (7, 5), dtype).at[2, 1].set(jnp.nan).at[3].set(-0.0)
    ids = jnp.asarray([[0, 2, 6], [6, 3, 9]])
    weights = jax.random.normal(jax.random.key(1), (2, 3, 5), dtype)

    def plainly(table, ids):
        return jnp.take(table, ids, axis=0, mode="clip")

    for way in (lambda f: f(table, ids), lambda f: jax.jvp(lambda t: f(t, ids), (table,), (table * 2,))[1],
                lambda f: jax.grad(lambda t: (f(t, ids) * weights).sum())(jnp.nan_to_num(table)),
                lambda f: jax.vmap(f, (None, 0))(table, ids)):  # fmt: skip
        ours, theirs = (np.asarray(way(f)) for f in (rows_of, plainly))
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))


def test_under_a_callers_jit_the_callers_code_is_left_alone(stored, monkeypatch):
    monkeypatch.setattr(generate, "widened", lambda *_: pytest.fail("made wide while tracing"))
    model = stored("bfloat16")
    ids, _ = batch(rows=1)
    jax.jit(lambda params, ids: model.generate(ids, params=params, max_new_tokens=2).sequences)(model.params, ids)


def test_too_little_memory_is_said_before_anything_is_made(stored, monkeypatch):
    model = stored("bfloat16")
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match="in float32"):
        model.generate(batch(rows=1)[0], max_new_tokens=2)
