"""Numbers that each decided a published bug: norm, embedding scale, rotary tables, activation."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny_gemma import prompts, tiny, tiny_config

import gemmakit
from gemmakit.pytorch.kernels.reference import rotate
from gemmakit.pytorch.layers import GemmaRMSNorm, GemmaRotaryEmbedding, GemmaScaledEmbedding

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


# -- RMSNorm ---------------------------------------------------------------------------------------------------------


def norm_with(weight):
    norm = GemmaRMSNorm(weight.numel())
    norm.weight.data.copy_(weight)
    return norm


def test_norm_scales_by_one_plus_weight_after_dividing_by_the_root_mean_square():
    x, w = torch.tensor([[3.0, -4.0]]), torch.tensor([0.5, -1.0])
    rms = math.sqrt((9 + 16) / 2 + 1e-6)
    assert norm_with(w)(x).tolist()[0] == pytest.approx([3 / rms * 1.5, 0.0], rel=1e-6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norm_multiplies_before_the_cast(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=generator).to(dtype)
    w = torch.randn(128, generator=generator).to(dtype)
    wide = x.double()
    wide = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    once = (wide * (1 + w.double())).to(dtype)
    twice = wide.to(dtype) * (1 + w)
    got = norm_with(w).to(dtype)(x)
    assert got.dtype == dtype
    # float32 against float64 can fall on the other side of a rounding step, seldom; the wrong order often.
    assert float((got != once).float().mean()) < 0.002
    assert float((twice != once).float().mean()) > 0.1


def test_norm_adds_eps_to_the_mean_square():
    norm = norm_with(torch.zeros(4))
    assert not norm(torch.zeros(1, 4)).any()
    assert norm(torch.full((1, 4), 1e-3)).tolist()[0] == pytest.approx([0.5**0.5] * 4, rel=1e-5)


def test_norm_survives_what_overflows_a_half():
    x = torch.full((1, 8), 6e4, dtype=torch.float16)
    assert torch.allclose(norm_with(torch.zeros(8)).half()(x).float(), torch.ones(8), atol=1e-3)


# -- embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "dtype", "scale"),
    [
        (2048, torch.bfloat16, 45.25), (2048, torch.float16, 45.25),
        (3072, torch.bfloat16, 55.5), (3072, torch.float16, 55.4375),
        (2048, torch.float32, 45.254833995939045), (3072, torch.float32, 55.42562584220407),
    ],
)  # fmt: skip
def test_embedding_scale_is_the_root_of_the_width_rounded_to_the_dtype(width, dtype, scale):
    embedding = GemmaScaledEmbedding(3, width).to(dtype)
    with torch.no_grad():
        embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
        embedding.weight[1, 0] = 1.0
    scaled = embedding(torch.tensor([[1]]))[0, 0]
    rounded = torch.tensor(scale, dtype=dtype)
    assert scaled[0] == rounded
    # Beyond the 1.0: an unrounded factor differs only where it tips the product's own rounding.
    assert torch.equal(scaled, embedding.weight[1] * rounded)
    if dtype != torch.float32:
        assert not torch.equal(scaled, embedding.weight[1] * width**0.5)


def test_the_tied_head_reads_the_unscaled_weight():
    model = tiny()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = model(prompts(), output_hidden_states=True)
    assert torch.allclose(out.logits, F.linear(out.hidden_states[-1], model.model.embed_tokens.weight), atol=1e-6)


# -- rotary tables ---------------------------------------------------------------------------------------------------


def tables(module, positions, dtype=torch.float32):
    return module(torch.as_tensor(positions)[None], dtype)


def test_rotary_angles_are_positions_times_inverse_frequencies_in_float32():
    config = gemmakit.GemmaConfig.preset("2b")
    cos, sin = tables(GemmaRotaryEmbedding(config), [0, 1, 777, 8191])
    for row, position in enumerate((0, 1, 777, 8191)):
        angles = position * 10000.0 ** (-torch.arange(0, 256, 2).double() / 256)
        both = torch.cat((angles, angles))
        # One float32 rounding of an angle of up to 8191 radians is 2.4e-4.
        assert (cos[0, 0, row] - both.cos()).abs().max() < 6e-4
        assert (sin[0, 0, row] - both.sin()).abs().max() < 6e-4


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.half().float(),
        copy.deepcopy,
        lambda m: copy.deepcopy(m.bfloat16()),
        lambda m: pickle.loads(pickle.dumps(m.bfloat16())),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: m.double(),
    ],
    ids=["to_bf16", "half", "half_and_back", "deepcopy", "bf16_deepcopy", "bf16_pickle", "meta_and_back", "double"],
)
def test_rotary_tables_survive(change):
    config = tiny_config(head_dim=16, max_position_embeddings=8192)
    fresh = GemmaRotaryEmbedding(config)
    changed = change(copy.deepcopy(fresh))
    assert changed.inv_freq.dtype == torch.float32
    for dtype in DTYPES:
        for mine, before in zip(tables(changed, [0, 5, 8191], dtype), tables(fresh, [0, 5, 8191], dtype), strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, before)


def test_whole_models_keep_their_tables_through_casts_copies_and_pickles():
    model = tiny()
    before = model.model.rotary_emb.inv_freq.clone()
    for changed in (copy.deepcopy(model).bfloat16(), pickle.loads(pickle.dumps(copy.deepcopy(model).half()))):
        assert torch.equal(changed.model.rotary_emb.inv_freq, before)
        assert changed.lm_head.weight is changed.model.embed_tokens.weight


def test_rope_theta_is_honoured():
    frequencies = {t: GemmaRotaryEmbedding(tiny_config(head_dim=8, rope_theta=t)).inv_freq for t in (10000.0, 500.0)}
    for theta, inv_freq in frequencies.items():
        assert inv_freq.tolist() == pytest.approx([theta ** (-i / 8) for i in (0, 2, 4, 6)], rel=1e-6)
    ids = prompts()
    assert not torch.allclose(tiny(rope_theta=500.0)(ids).logits, tiny()(ids).logits, atol=1e-3)


def test_rotation_turns_feature_i_with_feature_i_plus_half():
    x = torch.tensor([1.0, 0.0, 0.0, 2.0])[None, None, None]
    angle = torch.tensor([0.3, 1.1])
    cos, sin = torch.cat((angle, angle)).cos(), torch.cat((angle, angle)).sin()
    expected = [math.cos(0.3), -2 * math.sin(1.1), math.sin(0.3), 2 * math.cos(1.1)]
    assert rotate(x, cos, sin).flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_scores_depend_on_the_distance_alone():
    rope = GemmaRotaryEmbedding(tiny_config())
    q, k = torch.randn(2, 1, 1, 1, 12, generator=torch.Generator().manual_seed(0))
    scores = [float((rotate(q, *tables(rope, [a])) * rotate(k, *tables(rope, [a - 5]))).sum()) for a in (5, 6, 20, 60)]
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-4)


# -- activation and attention scale ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:hidden_act")
def test_gelu_is_the_tanh_form_and_the_exact_form_is_an_explicit_choice():
    model = tiny(hidden_act="gelu")
    assert model.config.hidden_act == "gelu_pytorch_tanh"
    x = torch.linspace(-4, 4, 101)
    act = model.model.layers[0].mlp.act_fn
    assert torch.equal(act(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(tiny(hidden_act="gelu_erf").model.layers[0].mlp.act_fn(x), F.gelu(x))
    assert not torch.equal(F.gelu(x), act(x))
    assert torch.equal(tiny(hidden_act=torch.sin).model.layers[0].mlp.act_fn(x), x.sin())


def test_attention_is_scaled_by_the_root_of_the_head_not_of_the_width():
    assert tiny(head_dim=16).model.layers[0].self_attn.scaling == 0.25
    with torch.device("meta"):
        big = gemmakit.GemmaModel(gemmakit.GemmaConfig(num_hidden_layers=1))
    assert big.layers[0].self_attn.scaling == 1 / 16
    assert big.layers[0].self_attn.q_proj.weight.shape == (4096, 3072)
