"""The fused decoding step against the modules, seam by seam and whole."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from seam_tools import DTYPES, FAR, far, native, near, quantized, steps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gemmakit.pytorch.cache import DynamicCache, StaticCache
from gemmakit.pytorch.fused import fused_layer, layers_plan
from gemmakit.pytorch.fused.reference import MAX_ROWS
from gemmakit.pytorch.fused.weights import weight_of
from gemmakit.pytorch.kernels import PackedWeight, cpu
from gemmakit.pytorch.kernels.linear import takes_any_rows, takes_many
from gemmakit.pytorch.layers import Linear
from gemmakit.pytorch.quantize.modules import QuantizedLinear
from gemmakit.pytorch.quantize.rounding import quantize

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))
from tiny_gemma import left_padded, prompts, tiny

pytestmark = pytest.mark.usefixtures("threads")
HEADS = [(4, 1), (4, 2), (4, 4)]


def chosen(layer, x, **more):
    with torch.no_grad():
        return fused_layer(layer, x, more.get("output_attentions", False))


def one_layer(dtype=torch.float32, B=1, S=1, **changes):
    layer = tiny(**changes).to(dtype).model.layers[0]
    x = torch.randn(B, S, layer.input_layernorm.weight.numel(), generator=torch.Generator().manual_seed(0))
    return layer, x.to(dtype)


# ---- seam by seam -----------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["plain", "int8", "int4"])
@pytest.mark.parametrize(("B", "S"), [(1, 1), (2, 3), (5, 1), (1, 8)])
def test_projections_of_a_seam_are_the_modules(threads, dtype, weights, B, S):
    for bias in (False, True):
        model = tiny(attention_bias=bias, head_dim=48, hidden_size=72, intermediate_size=200).to(dtype)
        if weights != "plain":
            quantized(model, int(weights[3:]), None if weights == "int8" else 32)
        layer = model.model.layers[0]
        layer.post_attention_layernorm = layer.input_layernorm  # so that both seams see the same numbers
        attention, mlp = layer.self_attn, layer.mlp
        x = torch.randn(B, S, 72, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            seams = fused_layer(layer, x, False)
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            normed = layer.input_layernorm(x)
            # Sums of 72 (200 below) products of numbers near 1, whose order in float32 is another: 1e-5; and where that
            # moves a sum over a rounding's edge, one unit of the format.
            for got, module in zip(seams.norm_qkv(x), projections, strict=True):
                near(got, module(normed), dtype, terms=1e-5)
            gated = seams.norm_gate_up(x)
            gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
            expected = mlp.act_fn(gate) * up
            # One unit in gate moves gelu by up to 1.13 units of gate, one in up moves the product by itself.
            unit = torch.finfo(dtype).eps
            near(gated, expected, dtype, roundings=2, terms=float(2 * unit * (gate.abs() * up.abs()).max()) + 1e-5)
            # The product is rounded, then the sum: a unit of the product as well.
            product = mlp.down_proj(expected)
            sums = seams.mlp_add(expected, x)
            near(sums, x + product, dtype, terms=float(unit * product.abs().max()) + 1e-5)


@native
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("B", "S"), [(3, 3), (1, 41)])
def test_projections_of_many_rows_are_the_modules_where_native_products_take_them(threads, dtype, weights, B, S):
    model = tiny(head_dim=48, hidden_size=72, intermediate_size=200).to(dtype)
    quantized(model, int(weights[3:]), None if weights == "int8" else 32)
    layer = model.model.layers[0]
    layer.post_attention_layernorm = layer.input_layernorm
    attention, mlp = layer.self_attn, layer.mlp
    x = torch.randn(B, S, 72, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        seams = fused_layer(layer, x, False)
        if not takes_any_rows(mlp.up_proj.packed, dtype):
            assert seams is None
            pytest.skip("this processor has no fast products of many rows by these weights")
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        normed, unit = layer.input_layernorm(x), torch.finfo(dtype).eps
        for got, module in zip(seams.norm_qkv(x), projections, strict=True):
            # Where the order of the norm's sum moves a number over an edge, it moves by one of 127 steps.
            step = float(normed.abs().max() * module.dequantized().abs().max()) / 127
            near(got, module(normed), dtype, terms=2 * step)
            assert (got - module(normed)).abs().mean() < step / 20 + unit
        gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
        expected = mlp.act_fn(gate) * up
        gated = seams.norm_gate_up(x)
        step = float(normed.abs().max() * mlp.up_proj.dequantized().abs().max()) / 127
        most = float(gate.abs().max() + up.abs().max())
        near(gated, expected, dtype, roundings=2, terms=(2 * unit * most + 4 * step) * most)
        # Nothing is left to a norm here: the product is the modules' to the bit, and the sum is rounded as theirs.
        assert torch.equal(seams.mlp_add(expected, x), x + mlp.down_proj(expected))


@native
def test_many_rows_of_plain_weights_stay_with_the_modules():
    layer, x = one_layer(S=9)
    assert chosen(layer, x) is None and chosen(layer, x[:, :8]) is not None


@native
@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu_erf", "silu", "relu", torch.tanh])
def test_every_activation_is_the_modules(act):
    layer, x = one_layer(hidden_act=act)
    normed, mlp = layer.post_attention_layernorm(x), layer.mlp
    with torch.no_grad():
        got = chosen(layer, x).norm_gate_up(x)
        torch.testing.assert_close(got, mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed), rtol=2e-5, atol=1e-6)


@native
def test_norm_weights_may_have_another_dtype():
    layer, x = one_layer(torch.bfloat16)
    layer.input_layernorm.float()
    with torch.no_grad():
        q, _, _ = chosen(layer, x).norm_qkv(x)
        torch.testing.assert_close(q, layer.self_attn.q_proj(layer.input_layernorm(x)), rtol=2**-7, atol=1e-5)


# ---- the whole step ---------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("context", [1, 17, 300])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_cached_steps_equal_the_modules(dtype, heads, context, padded, modules_only):
    N, K = heads
    model = tiny(num_attention_heads=N, num_key_value_heads=K, head_dim=16, max_position_embeddings=512).to(dtype)
    for (B, S), static in itertools.product(((1, 1), (1, 3), (2, 1), (2, 3), (5, 1)), (False, True)):
        ids, mask = prompts(B, context + 3 * S), None
        if padded:
            mask = torch.ones_like(ids)
            mask[0, : min(5, context)] = 0

        def run(B=B, S=S, static=static, ids=ids, mask=mask):
            cache = StaticCache(model.config, B, 400, dtype=dtype) if static else DynamicCache()
            return steps(model, ids, mask, S, cache)

        assert far(run(), modules_only(run)) <= FAR[dtype], (B, S, static)


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_fused_steps_are_as_near_to_float64_as_the_modules(dtype, modules_only):
    ours, theirs = [], []
    for seed in range(12):
        model = tiny(seed=seed, num_key_value_heads=(1, 2, 4)[seed % 3], attention_bias=True).to(dtype)
        ids = prompts(2, 8, seed=seed)
        run = lambda: steps(model, ids, None, 1, DynamicCache(), last=7).double()  # noqa: B023, E731
        fused, modules = run(), modules_only(run)
        model.double()
        exact = modules_only(run)
        ours.append((fused - exact).pow(2).mean().sqrt())
        theirs.append((modules - exact).pow(2).mean().sqrt())
    # 12 models of 2 * 7 * 130 logits each: the mean error is known to a few in a hundred.
    assert sum(ours) <= 1.1 * sum(theirs)


@native
@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_work_that_is_shared_by_threads_equals_the_modules(threads, dtype, modules_only):
    big = dict(hidden_size=512, intermediate_size=1024, head_dim=128, num_attention_heads=8, num_key_value_heads=1)
    model = tiny(**big, max_position_embeddings=1024, num_hidden_layers=1).to(dtype)
    ids = prompts(2, 806)
    run = lambda: steps(model, ids, None, 2, DynamicCache())  # noqa: E731
    assert far(run(), modules_only(run)) <= FAR[dtype]


@native
@pytest.mark.parametrize("weights", [(8, None), (4, 32), (4, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_quantized_steps_equal_the_modules(weights, dtype, modules_only):
    model = quantized(tiny(head_dim=64, hidden_size=64).to(dtype), *weights)
    # Every pass has at most MAX_ROWS rows: inputs are rounded to 16 bits on every processor.
    for B, S, width in ((1, 1, MAX_ROWS + 3), (2, 3, MAX_ROWS // 2 + 9)):
        ids = prompts(B, width)
        run = lambda: steps(model, ids, None, S, DynamicCache())  # noqa: B023, E731
        # To 16 bits of their block's largest: an edge crossed is 2^-15 of it, at 4 places a layer.
        assert far(run(), modules_only(run)) <= max(FAR[dtype], 4 * model.config.num_hidden_layers * 2**-15)


@native
@pytest.mark.parametrize("weights", [(8, None), (4, 32), (4, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_passes_over_many_rows_of_codes_equal_the_modules(weights, dtype, modules_only):
    model = quantized(tiny(head_dim=64, hidden_size=64).to(dtype), *weights)
    ids = prompts(3, 13)
    run = lambda: model(ids).logits.double()  # noqa: E731
    exact = modules_only(torch.enable_grad()(run)).detach()  # gradients need the inputs as they are
    got, expected = run(), modules_only(run)
    # Both round inputs to 8 bits of their block's largest where this processor multiplies bytes: an edge crossed is
    # 1/127 of it, at 4 places a layer.
    assert far(got, expected) <= max(FAR[dtype], 8 / 127)
    # Few edges are crossed: in the mean it is less than what rounding all inputs to 8 bits costs.
    if not takes_many(model.model.layers[0].mlp.up_proj.packed, dtype):
        assert far(got, expected) <= FAR[dtype]
        return
    assert (got - expected).norm() <= (exact - expected).norm() + FAR[torch.float32] * expected.norm()


@native
@pytest.mark.parametrize("head_dim", [16, 30, 64, 130, 256])
@torch.no_grad()
def test_every_head_size_equals_the_modules(head_dim, modules_only):
    model = tiny(head_dim=head_dim)
    ids = prompts(2, 20)
    got = steps(model, ids, None, 2, DynamicCache())
    expected = modules_only(lambda: steps(model, ids, None, 2, DynamicCache()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@native
@torch.no_grad()
def test_steps_without_a_cache_and_the_first_ones_equal_the_modules(modules_only):
    model = tiny()
    for ids, more in (
        (prompts(1, 5), dict(use_cache=False)),
        (prompts(2, 4), {}),
        (prompts(2, 4), dict(is_causal=False)),
        (prompts(1, 6), dict(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)),
    ):
        got, expected = model(ids, **more).logits, modules_only(lambda: model(ids, **more).logits)  # noqa: B023
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@native
@torch.no_grad()
def test_rows_of_only_padding_give_what_the_modules_give(modules_only):
    model = tiny()
    ids, mask = left_padded(list(map(torch.tensor, ([2, 5, 6, 7], [2]))), 4)
    mask[1] = 0
    run = lambda: model(ids, attention_mask=mask).logits  # noqa: E731
    torch.testing.assert_close(run(), modules_only(run), rtol=1e-5, atol=1e-5)
    dense = torch.rand(2, 1, 4, 4) < 0.6
    dense[0, 0, 2] = False
    for four in (dense, torch.zeros(2, 1, 4, 4).masked_fill(~dense, -1e30), dense[:1], dense[:, :, :1]):
        run = lambda: model(ids, attention_mask=four).logits  # noqa: B023, E731
        torch.testing.assert_close(run(), modules_only(run), rtol=1e-5, atol=1e-5)


@native
@torch.no_grad()
def test_cropped_and_reordered_caches_go_on_as_the_modules_do(modules_only):
    model, ids = tiny(), prompts(3, 12)

    def run(new):
        cache = new()
        model(ids, past_key_values=cache)
        cache.crop(7)
        first = model(ids[:, 7:9], past_key_values=cache).logits
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        return torch.cat((first, model(ids[:, 9:10], past_key_values=cache).logits), 1)

    for new in (DynamicCache, lambda: StaticCache(model.config, 3, 20, dtype=torch.float32)):
        torch.testing.assert_close(run(new), modules_only(lambda: run(new)), rtol=1e-5, atol=1e-5)  # noqa: B023


@native
@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static", "static", "dynamic"])
@torch.no_grad()
def test_generation_over_every_cache_gives_the_modules_tokens(kind, modules_only):
    model, ids = tiny(), prompts(2, 9)
    run = lambda: model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation=kind)  # noqa: E731
    assert torch.equal(run(), modules_only(run))


@native
@torch.no_grad()
def test_a_cache_of_another_dtype_is_refused_as_by_the_modules(modules_only):
    model, ids = tiny().to(torch.bfloat16), prompts(1, 1)
    new = lambda: StaticCache(model.config, 1, 20, dtype=torch.float32)  # noqa: E731
    for run in (lambda call: call(), modules_only):
        with pytest.raises(RuntimeError, match="same dtype"):
            run(lambda: model(ids, past_key_values=new()))


@native
@torch.no_grad()
def test_places_given_by_a_tensor_go_through_torch(modules_only):
    model, ids = tiny(), prompts(2, 6)

    def run():
        cache = StaticCache(model.config, 2, 10, dtype=torch.float32)
        return torch.cat(
            [
                model(ids[:, i : i + 1], past_key_values=cache, cache_position=torch.tensor([i])).logits
                for i in range(6)
            ],
            1,
        )

    torch.testing.assert_close(run(), modules_only(run), rtol=1e-5, atol=1e-5)


# ---- generation -------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "lookup": dict(prompt_lookup_num_tokens=4),
    "beams": dict(num_beams=3),
    "penalised": dict(repetition_penalty=1.3),
    "sampled": dict(do_sample=True, seed=3, num_return_sequences=2),
}


@native
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_modules_in_float32(way, modules_only):
    model = tiny(max_position_embeddings=128)
    for ids in (prompts(1, 9), prompts(2, 9)):
        if way == "lookup" and len(ids) > 1:
            continue
        run = lambda: model.generate(ids, **{"max_new_tokens": 30, "do_sample": False, **WAYS[way]})  # noqa: B023, E731
        assert torch.equal(run(), modules_only(run))


@native
def test_assisted_tokens_are_those_of_the_modules(modules_only):
    model, helper, ids = tiny(max_position_embeddings=128), tiny(num_hidden_layers=1), prompts(1, 9)
    run = lambda: model.generate(ids, max_new_tokens=30, do_sample=False, assistant_model=helper)  # noqa: E731
    assert torch.equal(run(), modules_only(run))


@native
def test_bfloat16_tokens_part_only_where_two_are_near(modules_only):
    model, ids = tiny(max_position_embeddings=128).to(torch.bfloat16), prompts(1, 9)
    more = dict(max_new_tokens=60, do_sample=False, return_dict_in_generate=True, output_scores=True)
    got, expected = model.generate(ids, **more), modules_only(lambda: model.generate(ids, **more))
    new = slice(ids.shape[1], None)
    parted = (got.sequences != expected.sequences)[0, new].nonzero()
    if len(parted):
        best = expected.scores[int(parted[0])][0].topk(2).values
        # 0.04 of the largest is how far logits may be from the modules' (FAR), once up and once down.
        assert float(best[0] - best[1]) <= 2 * FAR[torch.bfloat16] * float(expected.scores[int(parted[0])].abs().max())


# ---- who decides, and what is seen -------------------------------------------------------------------------------


@native
def test_a_plain_layer_is_fused_and_says_so():
    layer, _ = one_layer()
    assert str(layers_plan([layer])) == f"native {cpu.instruction_set()}, without gradients, up to {MAX_ROWS} rows"
    assert cpu.instruction_set() in tiny().decode_plan()["seams"]
    assert (
        "attention by torch (attn_implementation is 'eager')"
        in tiny(attn_implementation="eager").decode_plan()["seams"]
    )


@native
def test_the_reference_runs_where_somebody_needs_it():
    layer, x = one_layer()
    assert fused_layer(layer, x, False) is None  # gradients are on
    with torch.no_grad():
        assert fused_layer(layer, x.expand(9, 1, -1), False) is None
        assert fused_layer(layer, x, True) is None
        assert fused_layer(layer, x.double(), False) is None
        assert fused_layer(layer, x.to("meta"), False) is None
        assert fused_layer(layer, nn.Parameter(x), False) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fused_layer(layer, x, False) is None
        with FlopCounterMode(display=False):
            assert fused_layer(layer, x, False) is None
        asked = []
        torch.func.vmap(lambda row: asked.append(fused_layer(layer, row, False)) or row)(x[None])
        assert asked == [None]
        assert fused_layer(layer, x, False) is not None
    with torch.inference_mode():
        assert fused_layer(layer, x, False) is not None


@native
def test_dropout_of_training_runs_the_reference():
    layer, x = one_layer(attention_dropout=0.5)
    assert chosen(layer, x) is not None
    layer.train()
    assert chosen(layer, x) is None


@native
@pytest.mark.parametrize("at", ["self_attn", "mlp", "input_layernorm", "self_attn.q_proj", "mlp.down_proj"])
def test_hooks_see_their_calls_whenever_they_come_and_go(at):
    layer, x = one_layer()
    model = tiny()
    assert chosen(layer, x) is not None
    calls = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        target = model.model.layers[1].get_submodule(at)
        with torch.no_grad():
            model(prompts(1, 3))
            handle = getattr(target, register)(lambda *arguments: calls.append(1))
            model(prompts(1, 3))
            assert len(calls) == 1
            last = at.split(".")[-1]
            assert f"layers 1 to 1: modules ({last} has a hook)" in model.decode_plan()["seams"]
            handle.remove()
            calls.clear()
            model(prompts(1, 3))
            assert not calls
            assert "layers" not in model.decode_plan()["seams"]


@native
def test_hooks_for_every_module_see_their_calls():
    model, calls = tiny(), []
    with torch.no_grad():
        model(prompts(1, 3))
        handle = nn.modules.module.register_module_forward_hook(lambda m, *rest: calls.append(type(m).__name__))
        try:
            model(prompts(1, 3))
        finally:
            handle.remove()
    assert calls.count("GemmaMLP") == 2


@native
def test_replaced_and_rebuilt_parts_are_noticed():
    layer, x = one_layer()

    class Other(nn.Linear):
        pass

    assert chosen(layer, x) is not None
    plain = layer.mlp.up_proj
    layer.mlp.up_proj = Other(40, 64, bias=False)
    assert chosen(layer, x) is None
    assert "up_proj is a" in str(layers_plan([layer]))
    layer.mlp.up_proj = plain
    assert chosen(layer, x) is not None
    layer.mlp.forward = lambda x: x  # as offloading does
    assert chosen(layer, x) is None
    del layer.mlp.forward
    assert chosen(layer, x) is not None
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.double()
    assert chosen(layer, x) is None
    nn.utils.parametrizations.weight_norm(layer.mlp.gate_proj)
    assert chosen(layer, x) is None


@native
def test_weights_may_change_in_place_and_in_their_place(modules_only):
    model, ids = tiny(), prompts(1, 4)
    run = lambda: model(ids).logits  # noqa: E731
    weight = model.model.layers[0].mlp.gate_proj.weight
    changes = (
        lambda: weight.mul_(-1.5),
        lambda: setattr(weight, "data", torch.randn_like(weight)),
        lambda: setattr(model.model.layers[0].mlp.gate_proj, "weight", nn.Parameter(torch.randn_like(weight))),
        lambda: model.model.layers[1].input_layernorm.weight.add_(1),
        lambda: model.to(torch.bfloat16),
        lambda: model.to(torch.float32),
    )
    with torch.no_grad():
        before = run()
        for change in changes:
            change()
            now = run()
            assert not torch.equal(now, before)
            assert far(modules_only(run), now) <= (1e-5 if now.dtype == torch.float32 else FAR[torch.bfloat16])
            before = now


@native
def test_copies_decide_for_themselves(tmp_path):
    model, ids = tiny(), prompts(1, 4)
    with torch.no_grad():
        expected = model(ids).logits
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(twin(ids).logits, expected)
        assert torch.equal(loaded(ids).logits, expected)


@native
@pytest.mark.slow
def test_compiled_and_exported_models_hold_torchs_own_operations():
    model, ids = tiny(), prompts(1, 4)
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


@native
def test_adapters_keep_their_layer_on_the_modules():
    peft = pytest.importorskip("peft")
    model, ids = tiny(), prompts(1, 4)
    with torch.no_grad():
        plain = model(ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["v_proj"], layers_to_transform=[1]))
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, plain, rtol=1e-5, atol=1e-5)  # an adapter begins as nothing
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.fill_(0.5)
        assert not torch.allclose(adapted(ids).logits, plain, rtol=1e-3, atol=1e-3)
    assert "layers 1 to 1: modules (v_proj is a peft" in str(layers_plan(model.model.layers))


def test_weights_behind_modules():
    linear = Linear(3, 2)
    linear.weight.data.normal_()
    assert weight_of(linear) is linear.weight
    assert weight_of(nn.Linear(3, 2)) is not None
    packed = QuantizedLinear(quantize(torch.randn(4, 64), 8, None))
    assert isinstance(weight_of(packed), PackedWeight)
    for other in (nn.Identity(), type("Mine", (nn.Linear,), {})(3, 2), nn.Bilinear(2, 2, 2)):
        assert weight_of(other) is None
    linear.register_forward_hook(lambda *arguments: None)
    assert weight_of(linear) is None


def test_without_the_library_the_modules_run(monkeypatch):
    monkeypatch.setattr("gemmakit.native._loaded", lambda: (None, "switched off by GEMMAKIT_NATIVE=0"))
    model, ids = tiny(), prompts(1, 4)
    assert chosen(model.model.layers[0], torch.randn(1, 1, 40)) is None
    assert model.decode_plan()["seams"] == "modules (native kernel switched off by GEMMAKIT_NATIVE=0)"
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 7)


@native
def test_a_number_that_is_none_shows_in_the_logits():
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = torch.nan
        assert model(prompts(1, 4)).logits.isnan().any()
