"""Products while tokens are made on a CPU, by weights as they are stored or made wide once a call: the same results."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_tools import apart, batch, flat

from gemmakit import native
from gemmakit.checkpoint import memory
from gemmakit.errors import NotEnoughMemory
from gemmakit.flax import FlaxGemmaForCausalLM, init_lora, products
from gemmakit.flax.decode import step
from gemmakit.flax.layers import rows_of

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators multiply 16 bits: run on a CPU")

DTYPES = [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def stored(both):
    """(param_dtype, dtype, more) -> a model of the same weights, its head tied or not."""

    def make(param_dtype, dtype="float32", tied=True, **more):
        folder = both("mqa", max_position_embeddings=256, tie_word_embeddings=tied).folder
        return FlaxGemmaForCausalLM.from_pretrained(folder, dtype, param_dtype=param_dtype, **more)

    return make


@pytest.fixture(params=["native", "wide"])
def way(request, monkeypatch):
    """With the native kernels, or as if there were none."""
    if request.param == "wide":
        monkeypatch.setattr(products, "is_native", lambda: False)
    elif not products.is_native():
        pytest.skip(f"needs the compiled kernels: {native.absence()}")
    return request.param


def told(model):
    return model.products(model.stored_params, copies=True)


@pytest.mark.parametrize(("param_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_products_read_is_told_and_nothing_else(stored, way, param_dtype, dtype, tied):
    """Nothing is copied that native code reads as it lies, unless products in `dtype` would round it first."""
    model = stored(param_dtype, dtype, tied)
    params = flat(model.params)
    head = "model/embed_tokens/embedding" if tied else "lm_head/kernel"
    found = flat(told(model))
    assert set(found) == {path for path in params if path.endswith("_proj/kernel")} | {head}
    for path, leaf in found.items():
        assert leaf.dtype == jnp.float32, path
        if way == "native" and (param_dtype, dtype) != ("float32", "bfloat16"):
            assert leaf.size == 0
        else:
            np.testing.assert_array_equal(leaf, params[path].astype(dtype).astype("float32"), path)
    assert {str(leaf.dtype) for leaf in params.values()} == {param_dtype}


def test_without_native_code_nothing_is_copied_where_all_is_wide(stored, monkeypatch):
    monkeypatch.setattr(products, "is_native", lambda: False)
    assert told(stored("float32")) == {}


def test_on_a_mesh_xla_multiplies(stored):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))
    assert told(stored("float32", mesh=mesh)) == {}
    assert all(leaf.size for leaf in flat(told(stored("bfloat16", mesh=mesh))).values())


@pytest.mark.parametrize(("param_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("more", [{}, {"tied": False}, {"scan_layers": True}])
def test_logits_are_those_of_the_stored_weights(stored, way, param_dtype, dtype, more):
    """To what another order of float32 sums costs; in 16 bits a number near the middle may fall to either side."""
    model = stored(param_dtype, dtype, **more)
    ids, mask = batch("left")
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    given = model.variables()
    without = model.module.apply(given, ids, mask, positions).logits
    given["products"] = told(model)
    assert apart(model.module.apply(given, ids, mask, positions).logits, without, mask) < (
        1e-5 if dtype == "float32" else 2**-5
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 3}, {"num_beams": 2}])
@pytest.mark.parametrize("more", [{}, {"tied": False}, {"scan_layers": True}])
def test_tokens_are_those_of_the_stored_weights(stored, way, monkeypatch, rows, settings, more):
    model = stored("bfloat16", **more)
    ids, mask = batch("left" if rows > 1 else "none", rows=rows)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, init_lora(model.params, rank=2, rng=jax.random.key(0)))
    asked = dict(attention_mask=mask, max_new_tokens=12, eos_token_id=None, lora=lora, **settings)
    ours = model.generate(ids, **asked).sequences
    monkeypatch.setattr(products, "told", lambda *_, **__: {})
    np.testing.assert_array_equal(ours, model.generate(ids, **asked).sequences)


def test_a_stream_is_told_once(stored, way, monkeypatch):
    calls, once = [], products.told
    monkeypatch.setattr(products, "told", lambda *given, **more: calls.append(given) or once(*given, **more))
    ids, _ = batch(rows=1)
    assert len([*stored("bfloat16").stream(ids, max_new_tokens=6, eos_token_id=None)]) == 6
    assert len(calls) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_entering_the_loop_makes_nothing_of_a_weights_size(stored, way, tied, dtype):
    """A stream enters it for each token. Made of nothing but the stored weights, the same check finds something."""
    model = stored("bfloat16", dtype, tied)
    call = model._checked(batch(rows=1)[0], None, max_new_tokens=6, eos_token_id=None)
    shapes = {tuple(leaf.shape) for leaf in flat(model.params).values() if leaf.ndim > 1}
    shapes |= {shape[::-1] for shape in shapes}
    assert not made_ahead(call) & shapes
    del call.given.variables["products"]
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


def test_under_a_callers_jit_grad_or_vmap_the_callers_code_is_left_alone(stored, monkeypatch):
    monkeypatch.setattr(products, "told", lambda *_, **__: pytest.fail("told while tracing"))
    model = stored("bfloat16")
    ids, _ = batch(rows=1)
    jax.jit(lambda params, ids: model.generate(ids, params=params, max_new_tokens=2).sequences)(model.params, ids)
    lora = init_lora(model.params, rank=2, rng=jax.random.key(0))
    jax.grad(lambda lora: model(ids, lora=lora).logits.astype(float).sum())(lora)
    jax.vmap(lambda ids: model(ids).logits)(jnp.asarray(ids)[None])
    jax.jit(lambda mask: model(ids, mask).logits)(jnp.ones_like(ids))
    model(ids, train=True)


def test_a_call_while_something_is_traced_leaves_nothing_behind(stored):
    model = stored("bfloat16")
    ids, _ = batch(rows=1)
    traced = jax.jit(lambda t: model(ids).logits / t)(1.0)
    jax.eval_shape(lambda: model(ids).logits)
    assert apart(model(ids).logits, traced, np.ones_like(ids)) < 1e-5


def test_a_loss_may_generate_with_the_adapters_it_is_derived_by(stored):
    model = stored("bfloat16")
    ids, _ = batch(rows=1)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, init_lora(model.params, rank=2, rng=jax.random.key(0)))

    def scored(lora):
        made = model.generate(ids, lora=lora, max_new_tokens=3, eos_token_id=None).sequences
        return model(jax.lax.stop_gradient(made), lora=lora).logits.astype(float).sum()

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(scored)(lora)))


def test_weights_that_a_caller_spreads_over_devices_are_left_to_xla(stored):
    model = stored("float32")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    spread = jax.device_put(model.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    found = flat(model.products(spread, copies=False))
    assert bool(found) == (len(jax.devices()) == 1 and products.is_native())


@pytest.mark.parametrize(("param_dtype", "dtype"), DTYPES)
def test_a_call_copies_no_weight_and_gives_what_a_compiled_one_does(stored, param_dtype, dtype):
    model = stored(param_dtype, dtype)
    ids, mask = batch("left")
    assert not any(leaf.size for leaf in flat(model.products(model.stored_params, copies=False)).values())
    compiled = jax.jit(lambda params: model(ids, mask, params=params).logits)(model.params)
    assert apart(model(ids, mask).logits, compiled, mask) < (1e-5 if dtype == "float32" else 2**-5)


def test_too_little_memory_is_said_before_anything_is_made(stored, monkeypatch):
    model = stored("bfloat16")
    monkeypatch.setattr(products, "is_native", lambda: False)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match="in float32"):
        model.generate(batch(rows=1)[0], max_new_tokens=2)


# -- the products themselves ------------------------------------------------------------------------------------------

STORED = jnp.zeros(0)
needs_native = pytest.mark.skipif(not products.is_native(), reason=f"needs the compiled kernels: {native.absence()}")


@needs_native
@pytest.mark.parametrize("by_outputs", [False, True])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [("float32", "float32"), ("float32", "bfloat16"),
                                                     ("float32", "float16"), ("bfloat16", "bfloat16"),
                                                     ("float16", "float16")])  # fmt: skip
@pytest.mark.parametrize(("lead", "inputs", "outputs"), [((), 5, 3), ((1, 1), 2051, 70),
                                                         ((2, 8), 300, 1030), ((0,), 4, 4),
                                                         ((17,), 33, 65), ((3, 1, 30), 257, 520)])  # fmt: skip
def test_a_product_is_the_exact_one_rounded_once(dtype, weight_dtype, lead, inputs, outputs, by_outputs):
    rng = np.random.default_rng(inputs)
    x = jnp.asarray(rng.standard_normal((*lead, inputs))).astype(dtype)
    weight = jnp.asarray(rng.standard_normal((outputs, inputs) if by_outputs else (inputs, outputs)))
    weight = weight.astype(weight_dtype)
    found = jax.jit(lambda x, w: products.product(x, w, STORED, by_outputs=by_outputs))(x, weight)
    assert found.shape == (*lead, outputs) and found.dtype == x.dtype
    x, weight = (np.asarray(a.astype("float32")).astype(np.float64) for a in (x, weight))
    exact = x @ (weight.T if by_outputs else weight)
    # Sums of float32 in any order, then one rounding.
    sizes = np.abs(x) @ np.abs(weight.T if by_outputs else weight)
    room = sizes * inputs * 2.0**-24 + np.abs(exact) * float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(np.asarray(found.astype("float32")) - exact) <= room + 1e-30).all()


@needs_native
def test_a_product_that_does_not_fit_is_refused():
    wrong = jax.jit(lambda x, w: products.product(x, w, STORED))
    with pytest.raises(Exception, match="do not fit each other"):
        wrong(jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(Exception, match="float32, bfloat16 and float16"):
        wrong(jnp.ones((2, 4)), jnp.ones((4, 5), int))


@needs_native
@pytest.mark.parametrize("first", ["torch", "jax"])
def test_both_backends_share_the_threads_whichever_comes_first(first):
    """One OpenMP in the process: with two, each would wait in loops for threads of its own."""
    both = ["import torch; torch.ones(300, 300) @ torch.ones(300, 300)",
            "from gemmakit.flax import products; assert products.is_native()"]  # fmt: skip
    code = "; ".join(both if first == "torch" else both[::-1])
    code += "; print(len({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rpartition('/')[2]}))"
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux, which tells what a process has loaded")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
