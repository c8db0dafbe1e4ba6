"""The documented interface: constructor, parameters, cache, outputs, errors, and a package that works without jax."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_tools import COMMON, CountCompilations, apart, batch, flat
from tiny_shapes import SHAPES

import gemmakit
from gemmakit.errors import ConfigError, InputError, PromptTooLong, TokenOutOfRange
from gemmakit.flax import FlaxGemmaForCausalLM, FlaxGemmaModel
from gemmakit.flax.attention import Wanted


@pytest.fixture(scope="module")
def fresh():
    return FlaxGemmaForCausalLM(gemmakit.GemmaConfig(**COMMON, **SHAPES["gqa"], attention_bias=True), (1, 1), 7)


def test_names_at_the_top_are_the_classes():
    for name in (
        "FlaxGemmaModel",
        "FlaxGemmaForCausalLM",
        "FlaxGemmaForSequenceClassification",
        "FlaxGemmaForTokenClassification",
    ):
        assert getattr(gemmakit, name).__name__ == name
        assert name in gemmakit.__all__


def test_fresh_weights_follow_the_configuration_and_the_seed(fresh):
    leaves = flat(fresh.params)
    for path, leaf in leaves.items():
        if path.endswith(("weight", "bias")):
            assert not np.asarray(leaf).any(), path
    table = np.asarray(leaves["model/embed_tokens/embedding"])
    assert not table[0].any()  # the padding row
    assert table[1:].std() == pytest.approx(0.2, rel=0.05)
    same = flat(FlaxGemmaForCausalLM(fresh.config, seed=7).params)
    other = flat(FlaxGemmaForCausalLM(fresh.config, seed=8).params)
    kernel = "model/layers/1/mlp/up_proj/kernel"
    np.testing.assert_array_equal(leaves[kernel], same[kernel])
    assert (np.asarray(leaves[kernel]) != np.asarray(other[kernel])).any()
    assert (np.asarray(leaves[kernel]) != np.asarray(leaves[kernel.replace("1", "0")])).any()


@pytest.mark.parametrize("scan", [False, True])
def test_the_last_layer_takes_the_positions_asked_for_through_its_mlp(fresh, scan):
    """Those of layers that are one in a scan take all."""
    model = FlaxGemmaForCausalLM(fresh.config, seed=7, scan_layers=scan)
    ids, widths = jnp.asarray(batch()[0]), []
    params = model.module.init(jax.random.PRNGKey(3), ids)["params"]

    def logits(**asked):
        widths.clear()
        with nn.intercept_methods(watch):
            return model.module.apply({"params": params}, ids, **asked).logits

    def watch(run, given, options, context):
        if type(context.module).__name__ == "FlaxGemmaMLP":
            widths.append(given[0].shape[1])
        return run(*given, **options)

    whole, S = logits(), ids.shape[1]
    for last in (1, 3, S, S + 1):
        assert apart(logits(logits_to_keep=last), whole[:, -last:]) < 1e-5
        assert widths[-1] == (S if scan else min(last, S))
        assert set(widths[:-1]) <= {S}
    everything = model.module.apply({"params": params}, ids, wanted=Wanted(hidden_states=True), logits_to_keep=1)
    assert {state.shape[1] for state in everything.hidden_states} == {S}


def test_the_module_is_an_ordinary_linen_module(fresh):
    assert isinstance(fresh.module, nn.Module)
    ids, _ = batch()
    made = fresh.module.init(jax.random.PRNGKey(0), jnp.asarray(ids))
    assert flat(made["params"]).keys() == flat(fresh.params).keys()
    logits = fresh.module.apply({"params": fresh.params}, jnp.asarray(ids)).logits
    assert apart(logits, fresh(ids).logits) < 1e-5
    assert hash(fresh.module) == hash(FlaxGemmaForCausalLM(fresh.config, _do_init=False).module)


def test_without_do_init_parameters_come_with_the_call(fresh):
    model = FlaxGemmaForCausalLM(fresh.config, _do_init=False)
    ids, _ = batch()
    with pytest.raises(InputError, match="pass params="):
        model(ids)
    assert apart(model(ids, params=fresh.params).logits, fresh(ids).logits) == 0.0
    assert model.required_params == fresh.required_params
    model.params = fresh.params
    assert apart(model(ids).logits, fresh(ids).logits) == 0.0
    with pytest.raises(InputError, match="the parameters lack model/norm/weight"):
        model.params = {"model": {k: v for k, v in fresh.params["model"].items() if k != "norm"}}
    assert flat(model.init_weights(jax.random.PRNGKey(7), (1, 1))).keys() == flat(fresh.params).keys()


def test_casts_change_floating_leaves_and_follow_a_mask(fresh):
    half = fresh.to_bf16(fresh.params)
    assert {str(x.dtype) for x in flat(half).values()} == {"bfloat16"}
    assert {str(x.dtype) for x in flat(fresh.to_fp32(half)).values()} == {"float32"}
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path), fresh.params)
    for path, leaf in flat(fresh.to_fp16(fresh.params, mask)).items():
        assert str(leaf.dtype) == ("float32" if "norm" in path else "float16")
    with pytest.raises(InputError, match="mask must be a tree"):
        fresh.to_bf16(fresh.params, {"model": True})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_is_of_the_computation_not_of_the_parameters(fresh, dtype):
    model = FlaxGemmaModel(fresh.config, dtype=dtype)
    assert {str(x.dtype) for x in flat(model.params).values()} == {"float32"}
    assert model(batch()[0]).last_hidden_state.dtype == dtype
    assert model.init_cache(1, 4)["layers"]["0"]["key"].dtype == dtype


def test_outputs_read_by_name_key_and_index_and_as_a_tuple(fresh):
    ids, _ = batch()
    out = fresh(ids, output_hidden_states=True)
    assert list(out.keys()) == ["logits", "hidden_states"]
    assert out["logits"] is out.logits is out[0]
    plain = fresh(ids, return_dict=False, past_key_values=fresh.init_cache(3, 11))
    assert [type(x) for x in plain[1:]] == [dict]
    assert apart(plain[0], out.logits) < 1e-5
    mapped = jax.tree_util.tree_map(lambda x: x * 2, out)
    np.testing.assert_array_equal(mapped.logits, out.logits * 2)


def test_calls_compile_once_a_shape(fresh):
    ids, mask = batch("left")
    fresh(ids, mask)
    with CountCompilations() as seen:
        for seed in range(4):
            fresh(*batch("left", seed=seed))
        fresh(jnp.asarray(ids), jnp.asarray(mask), params=fresh.params)
    assert seen.count <= 2  # jnp.asarray's own, of the int64 arrays


def test_a_cache_knows_its_size(fresh):
    ids, _ = batch()
    with pytest.raises(PromptTooLong, match=r"init_cache\(3, 11\)"):
        fresh(ids, past_key_values=fresh.init_cache(3, 10))
    with pytest.raises(InputError, match="holds 2 rows"):
        fresh(ids, past_key_values=fresh.init_cache(2, 11))
    with pytest.raises(InputError, match="init_cache did not make"):
        fresh(ids, past_key_values=((1, 2),))
    with pytest.raises(InputError, match="max_length is 0"):
        fresh.init_cache(1, 0)


def test_wrong_inputs_are_refused(fresh):
    ids, mask = batch("left")
    with pytest.raises(TokenOutOfRange, match="token id 160 is outside the vocabulary of 160"):
        fresh(ids + 160 - ids.max())
    with pytest.raises(InputError, match="input_ids has shape"):
        fresh(ids[0])
    with pytest.raises(InputError, match="attention_mask covers 10 positions"):
        fresh(ids, mask[:, 1:])
    with pytest.raises(InputError, match="labels has shape"):
        fresh(ids, labels=ids[:, 1:])
    with pytest.raises(InputError, match="label 200"):
        fresh(ids, labels=np.where(mask, ids, 200))
    with pytest.raises(ConfigError, match="flash"):
        FlaxGemmaModel(gemmakit.GemmaConfig(**COMMON, **SHAPES["mqa"], attn_implementation="flash_attention_2"))
    with pytest.raises(InputError, match="dtype is"):
        FlaxGemmaModel(fresh.config, dtype=jnp.int32)
    with pytest.raises(InputError, match="config is a dict"):
        FlaxGemmaModel({"hidden_size": 3})


def test_eager_and_fused_attention_agree(fresh):
    ids, mask = batch("right")
    fused = fresh(ids, mask).logits
    fresh.config.attn_implementation = "eager"
    assert apart(fresh(ids, mask).logits, fused, mask) < 1e-5
    fresh.config.attn_implementation = "sdpa"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_gemmakit_loads_no_jax_and_without_jax_says_what_to_install():
    assert run("import sys, gemmakit; print('jax' in sys.modules, 'flax' in sys.modules)") == ["False", "False"]
    code = """
import sys
sys.modules["jax"] = None
import gemmakit
try:
    gemmakit.FlaxGemmaModel
except gemmakit.errors.MissingDependency as e:
    print("pip install 'gemmakit[flax]'" in str(e))
"""
    assert run(code) == ["True"]
