"""The fused decoding step of Gemma 2 to 4 and VaultGemma against their modules: norms of heads, windows, caps."""

import ctypes
import itertools
import sys
from pathlib import Path

import pytest
import torch
from seam_tools import DTYPES, FAR, far, native, near, quantized, steps

import gemmakit
from gemmakit.family import KINDS
from gemmakit.pytorch.attention import GemmaAttention
from gemmakit.pytorch.cache import DynamicCache, StaticCache
from gemmakit.pytorch.cache.window import WindowCache, WindowLayer
from gemmakit.pytorch.fused import fused_layer, layers_plan
from gemmakit.pytorch.fused.cpu import native_norm
from gemmakit.pytorch.fused.reference import MAX_ROWS
from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.kernels.linear import takes_many
from gemmakit.pytorch.layers import GemmaRMSNorm

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))
from tiny_gemma import away_from_zero, prompts

pytestmark = [native, pytest.mark.usefixtures("threads")]
WINDOW = 8
SIZES = dict(vocab_size=130, hidden_size=40, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
             head_dim=12, max_position_embeddings=512, sliding_window=WINDOW, query_pre_attn_scalar=20,
             num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])  # fmt: skip
CAPS = dict(attn_logit_softcapping=5.0, final_logit_softcapping=30.0)
MEMBERS = {
    "gemma2": CAPS,
    "gemma3_text": {},
    "vaultgemma": CAPS,
    "gemma4_text": dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        query_pre_attn_scalar=None, global_head_dim=20, attention_k_eq_v=True, num_global_key_value_heads=1,
        hidden_size_per_layer_input=6, vocab_size_per_layer_input=130, final_logit_softcapping=30.0,
    ),
}  # fmt: skip
# Layers as released, one of each kind, with fewer tokens.
REAL = {
    "gemma3 270M": ("gemma3_text", dict(hidden_size=640, intermediate_size=2048, num_attention_heads=4,
                    num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256)),
    "gemma3 27B, an eighth": ("gemma3_text", dict(hidden_size=672, intermediate_size=2688, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=128, query_pre_attn_scalar=168)),
    "gemma4 12B, an eighth": ("gemma4_text", dict(hidden_size=480, intermediate_size=1920, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=256, global_head_dim=512)),
    "gemma2 2B, a half": ("gemma2", dict(hidden_size=1152, intermediate_size=4608, num_attention_heads=8,
                    num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, attn_logit_softcapping=50.0)),
}  # fmt: skip
everyone = pytest.mark.parametrize("member", MEMBERS)


def model_of(member, seed=0, **changes):
    classes = KINDS[member].classes
    config = getattr(gemmakit, classes["config"])(**{**SIZES, **MEMBERS[member], **changes})
    return away_from_zero(getattr(gemmakit, classes["causal_lm"])(config), seed).eval()


@pytest.fixture
def never_by_torch(monkeypatch):
    """From now on attention by its modules is a failure."""

    def arm():
        def refuse(*arguments):
            raise AssertionError("attention went through torch")

        monkeypatch.setattr(GemmaAttention, "attend", refuse)

    return arm


# ---- seam by seam -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["plain", "int8", "int4"])
@pytest.mark.parametrize(("B", "S"), [(1, 1), (2, 3), (1, 8), (3, 5)])
@torch.no_grad()
def test_a_projection_is_normed_before_it_is_added(threads, dtype, weights, B, S):
    model = model_of("gemma3_text").to(dtype)
    if weights != "plain":
        quantized(model, int(weights[3:]), None if weights == "int8" else 32)
    layer = model.model.layers[0]
    p, g = layer.parts(), torch.Generator().manual_seed(1)
    x = torch.randn(B, S, 40, generator=g).to(dtype)
    seams = fused_layer(layer, x, False)
    many = B * S > MAX_ROWS
    if seams is None and many:
        assert weights == "plain" or not takes_many(p.o_proj.packed, dtype)
        pytest.skip("more rows than the kernels of these weights take")
    for add, module, norm in (
        (seams.attention_add, p.o_proj, p.norms.after_attention),
        (seams.mlp_add, p.down_proj, p.norms.after_mlp),
    ):
        given = torch.randn(B, S, module.in_features, generator=g).to(dtype)
        product = module(given)
        normed, unit = norm(product), torch.finfo(dtype).eps
        # A product may be off by a unit of its own, or by its sum's order, and the mean square with it; the norm makes
        # of that its share; then the norm's and the sum's units.
        grown = float((normed.abs().amax() / product.abs().amax(-1)).max() * (1 + norm.weight.abs().max()))
        off = float(unit * product.abs().max()) + 1e-5
        near(add(given, x), x + normed, dtype, terms=float(unit * normed.abs().max()) + 4 * grown * off)


# ---- the whole step ---------------------------------------------------------------------------------------------


@everyone
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [1, WINDOW - 1, 41])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_cached_steps_of_every_member_equal_the_modules(member, dtype, context, padded, modules_only):
    model = model_of(member).to(dtype)
    kinds = ("dynamic", "static", "window")
    for (B, S), kind in itertools.product(((1, 1), (1, 3), (2, 1), (2, 3), (5, 1)), kinds):
        ids, mask = prompts(B, context + 3 * S), None
        if padded:
            mask = torch.ones_like(ids)
            mask[0, : min(5, context)] = 0

        def run(B=B, S=S, kind=kind, ids=ids, mask=mask):
            if kind == "static":
                return steps(model, ids, mask, S, StaticCache(model.config, B, 100, dtype=dtype))
            return steps(model, ids, mask, S, DynamicCache() if kind == "dynamic" else WindowCache(model.config))

        assert far(run(), modules_only(run)) <= FAR[dtype], (B, S, kind)


@everyone
@torch.no_grad()
def test_a_cache_that_forgets_moves_its_keys_as_often_as_it_must(member, never_by_torch, modules_only):
    """A buffer is full after about 80 tokens; then what is kept goes to its beginning."""
    model, ids = model_of(member), prompts(2, 200)
    expected = modules_only(lambda: model(ids).logits)
    cache = WindowCache(model.config)
    model(ids[:, :20], past_key_values=cache)
    never_by_torch()
    got = [model(ids[:, i : i + 2], past_key_values=cache).logits for i in range(20, 150, 2)]
    cache.crop(130)
    got[55:] = [model(ids[:, i : i + 2], past_key_values=cache).logits for i in range(130, 200, 2)]
    assert any(layer.forgotten for layer in cache.layers if isinstance(layer, WindowLayer))
    assert far(torch.cat(got, 1), expected[:, 20:]) <= FAR[torch.float32]


@everyone
@pytest.mark.parametrize("kind", [DynamicCache, WindowCache])
@torch.no_grad()
def test_a_step_of_every_member_runs_native_and_says_so(member, kind, never_by_torch):
    model, ids = model_of(member), prompts(2, 30)
    expected = f"native {cpu.instruction_set()}, without gradients, up to {MAX_ROWS} rows"
    assert str(layers_plan(model.model.layers)) == expected
    cache = kind(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    never_by_torch()
    for i in range(20, 30):
        model(ids[:, i : i + 1], past_key_values=cache)
    cache.crop(20)
    model(ids[:, 20:24], past_key_values=cache)


# Of Gemma 4 the last layer sees everything.
@pytest.mark.parametrize("member", [member for member in MEMBERS if not KINDS[member].ends_full])
@torch.no_grad()
def test_what_a_window_has_left_behind_is_not_read(member):
    model, ids = model_of(member, layer_types=["sliding_attention"] * 2), prompts(1, 4 * WINDOW + 2)

    def run(poison):
        cache = DynamicCache()
        model(ids[:, :-2], past_key_values=cache)
        for layer in cache.layers:
            for held in (layer.keys, layer.values):
                held[:, :, : -(WINDOW - 1)] = poison  # the first of two new queries sees itself and so many
        return model(ids[:, -2:], past_key_values=cache).logits

    assert torch.equal(run(torch.nan), run(7.0))


@everyone
@pytest.mark.parametrize("weights", [(8, None), (4, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_quantized_steps_of_every_member_equal_the_modules(member, weights, dtype, modules_only):
    model = quantized(model_of(member, hidden_size=64).to(dtype), *weights)
    # Every pass has at most MAX_ROWS rows: inputs are rounded to 16 bits on every processor.
    for B, S in ((1, 1), (1, 3), (2, 3)):
        ids = prompts(B, MAX_ROWS // B + 3 * S)
        run = lambda: steps(model, ids, None, S, DynamicCache())  # noqa: B023, E731
        # To 16 bits of their block's largest: an edge crossed is 2^-15 of it, at 4 places a layer, in half of them.
        assert far(run(), modules_only(run)) <= max(FAR[dtype], 8 * 2**-16)


@everyone
@pytest.mark.parametrize("weights", [(8, None), (4, 32)])
@torch.no_grad()
def test_prompts_of_codes_equal_the_modules(member, weights, modules_only):
    """More rows than MAX_ROWS: fused where this processor multiplies bytes."""
    model, ids = quantized(model_of(member, hidden_size=64), *weights), prompts(3, 13)
    run = lambda: model(ids).logits.double()  # noqa: E731
    exact = modules_only(torch.enable_grad()(run)).detach()
    got, expected = run(), modules_only(run)
    assert far(got, expected) <= 8 / 127
    assert (got - expected).norm() <= (exact - expected).norm() + FAR[torch.float32] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@everyone
@torch.no_grad()
def test_fused_steps_of_every_member_are_as_near_to_float64_as_the_modules(member, dtype, modules_only):
    ours, theirs = [], []
    for seed in range(12):
        model = model_of(member, seed=seed, num_key_value_heads=(1, 2, 4)[seed % 3]).to(dtype)
        ids = prompts(2, 3 * WINDOW, seed=seed)
        run = lambda: steps(model, ids, None, 1, DynamicCache(), last=7).double()  # noqa: B023, E731
        fused, modules = run(), modules_only(run)
        model.double()
        exact = modules_only(run)
        ours.append((fused - exact).pow(2).mean().sqrt())
        theirs.append((modules - exact).pow(2).mean().sqrt())
    # 12 models of 2 * 7 * 130 logits each: the mean error is known to a few in a hundred.
    assert sum(ours) <= 1.1 * sum(theirs)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", REAL)
@torch.no_grad()
def test_released_layers_equal_the_modules(shape, dtype, threads, modules_only):
    member, sizes = REAL[shape]
    model = model_of(member, **sizes, initializer_range=0.02, sliding_window=64)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(0.1)  # as released weights: about 0.02
    model.to(dtype)
    for B, S in ((1, 1), (2, 3)):
        ids = prompts(B, 150)
        run = lambda: steps(model, ids, None, S, DynamicCache())  # noqa: B023, E731
        assert far(run(), modules_only(run)) <= FAR[dtype]


@pytest.mark.parametrize("member", ["gemma2", "gemma3_text"])
@torch.no_grad()
def test_a_stream_that_float16_cannot_hold_is_scaled_in_both_forms_alike(member, modules_only):
    model = model_of(member)
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight.mul_(0.1).add_(40_000.0)
    run = lambda: steps(model, prompts(2, 30), None, 1, DynamicCache())  # noqa: E731
    hidden = modules_only(lambda: model(prompts(2, 30), output_hidden_states=True).hidden_states)
    assert hidden[1].abs().max() > torch.finfo(torch.float16).max
    exact = modules_only(run)
    model.half()
    got, expected = run(), modules_only(run)
    assert got.isfinite().all()
    assert far(got, expected) <= FAR[torch.float16]
    assert far(got, exact) <= 4 * FAR[torch.float16]  # weights are rounded too


# ---- who decides ------------------------------------------------------------------------------------------------


def test_norms_of_heads_are_parts_that_hooks_and_replacements_change():
    layer = model_of("gemma3_text").model.layers[0]
    x = torch.randn(1, 1, 40)
    with torch.no_grad():
        assert fused_layer(layer, x, False) is not None
        handle = layer.self_attn.k_norm.register_forward_hook(lambda *arguments: None)
        assert fused_layer(layer, x, False) is None
        assert str(layers_plan([layer])) == "modules (k_norm has a hook)"
        handle.remove()
        assert fused_layer(layer, x, False) is not None
        layer.self_attn.q_norm = torch.nn.RMSNorm(12)
        assert fused_layer(layer, x, False) is None
        assert "q_norm is a torch.nn" in str(layers_plan([layer]))


def test_a_norm_without_a_weight_reads_zeros_that_stay_whatever_torchs_defaults_are():
    norm, width, before = GemmaRMSNorm(1, weighted=False), 1021, torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = native_norm(norm, torch.float32, width)
    finally:
        torch.set_default_dtype(before)
    others = [native_norm(norm, torch.float32, other) for other in range(1, 41)]
    assert len({found.weight, *(other.weight for other in others)}) == 41
    assert found.format == cpu.FORMATS[torch.float32]
    assert not any((ctypes.c_float * width).from_address(found.weight))


def test_settings_of_a_norm_may_change(modules_only):
    model, ids = model_of("gemma3_text"), prompts(1, 4)
    run = lambda: model(ids).logits  # noqa: E731
    layer = model.model.layers[0]
    with torch.no_grad():
        before = run()
        layer.self_attn.q_norm.eps = layer.post_feedforward_layernorm.eps = 5.0
        assert not torch.equal(run(), before)
        torch.testing.assert_close(run(), modules_only(run), rtol=1e-4, atol=1e-4)
        layer.input_layernorm.offset = 0.0
        assert fused_layer(layer, torch.randn(1, 1, 40), False) is not None
        torch.testing.assert_close(run(), modules_only(run), rtol=1e-4, atol=1e-4)
