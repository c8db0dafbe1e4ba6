"""Every attention implementation against one written-out reference: who sees whom, and what comes of it.

transformers is no oracle for bidirectional attention: in 5.23 the setting has an effect under sdpa without padding
only; with padding, and under eager and flex_attention always, it stays causal. The reference here is the definition, in
float64 loops.
flash_attn needs a CUDA GPU, so a stand-in with its documented signature and alignment takes its place.
"""

from __future__ import annotations

import importlib.machinery
import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemmakit import DynamicCache, GemmaConfig, GemmaForCausalLM, GemmaModel, StaticCache
from gemmakit.errors import ConfigError, InputError, MissingDependency
from gemmakit.pytorch import attention
from gemmakit.pytorch.attention import IMPLEMENTATIONS, MASKLESS
from gemmakit.pytorch.masks import visibility

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

# float32 sums in another order; float16 rounds inputs of the products to 11 bits, in the reference too.
CLOSE = {torch.float32: dict(atol=2e-6, rtol=1e-4), torch.float16: dict(atol=2e-3, rtol=2e-3)}
B, N, K, H = 3, 4, 2, 8


def dtype_of(name: str) -> torch.dtype:
    return torch.float16 if name == "flash_attention_2" else torch.float32


def attend_one(q, k, v, scale, causal):
    """What flash_attn promises for one sequence: (S, N, H) against (T, K, H), causal from the bottom right corner."""
    S, T, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    scores = torch.einsum("snh,tnh->nst", q.float(), k.float().repeat_interleave(groups, 1)) * scale
    if causal:
        later = torch.arange(T) > torch.arange(S)[:, None] + (T - S)
        scores = scores.masked_fill(later, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("nst,tnh->snh", weights, v.float().repeat_interleave(groups, 1)).to(q.dtype)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return torch.stack([attend_one(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False):  # fmt: skip
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (q.shape[0], k.shape[0])
    parts = [
        attend_one(q[a:b], k[c:d], v[c:d], softmax_scale, causal)
        for a, b, c, d in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
    ]
    return torch.cat(parts)


@pytest.fixture(autouse=True)
def _flash_attn(monkeypatch):
    stand_in = types.ModuleType("flash_attn")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    stand_in.flash_attn_func, stand_in.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)


# -- attention by itself ------------------------------------------------------------------------------------------


def tensors(S, T, dtype, grad=False):
    g = torch.Generator().manual_seed(S * 100 + T)
    shapes = ((B, N, S, H), (B, K, T, H), (B, K, T, H))
    return [torch.randn(s, generator=g).to(dtype).requires_grad_(grad) for s in shapes]


def reference(q, k, v, sees, scale):
    """Softmax over what sees(b, n, i, j) allows; it gives a truth value or a number to add to the score."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for b, n, i in ((b, n, i) for b in range(q.shape[0]) for n in range(q.shape[1]) for i in range(q.shape[2])):
        g = n // (q.shape[1] // k.shape[1])
        allowed = {j: sees(b, n, i, j) for j in range(k.shape[2])}
        added = {j: 0.0 if a is True else float(a) for j, a in allowed.items() if a is not False and a != -math.inf}
        if added:
            scores = torch.stack([q[b, n, i] @ k[b, g, j] * scale + x for j, x in added.items()])
            out[b, n, i] = scores.softmax(0) @ v[b, g, list(added)]
    return out


# B rows; the last one of "blank" has no token at all.
PADDING = {
    "none": None,
    "left": [[0] * n + [1] * (7 - n) for n in (0, 2, 5)],
    "right": [[1] * (7 - n) + [0] * n for n in (0, 2, 5)],
    "holes": [[1] * 7, [0, 1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 1, 1]],
    "blank": [[1] * 7, [0, 0, 1, 1, 1, 1, 1], [0] * 7],
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("S", [7, 3, 1], ids=["whole", "chunk", "step"])
def test_padding_and_cached_keys(name, causal, padding, S):
    T, dtype = 7, dtype_of(name)
    q, k, v = tensors(S, T, dtype)
    rows = PADDING[padding]
    mask = None if rows is None else torch.tensor(rows)
    visible = visibility(mask, batch=B, queries=S, keys=T, past=T - S, causal=causal, position_ids=None,
                         device=q.device, dense=name not in MASKLESS)  # fmt: skip
    out, _ = IMPLEMENTATIONS[name](q, k, v, visible, scale=0.3, dropout=0.0)

    def sees(b, n, i, j):
        return (rows is None or rows[b][j] == 1) and (not causal or j <= T - S + i)

    expected = reference(q, k, v, sees, 0.3).to(dtype)
    if name == "flash_attention_2" and mask is not None:  # queries that are padding are left out there: zeros
        real = mask[:, T - S :, None].bool()
        assert (out.transpose(1, 2)[~real.squeeze(-1)] == 0).all()
        expected = expected * real[:, None]
    torch.testing.assert_close(out, expected, **CLOSE[dtype])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_packed_documents_see_only_themselves(name, causal):
    dtype = dtype_of(name)
    q, k, v = tensors(7, 7, dtype)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 0, 1]])
    numbers = [[0, 0, 0, 1, 1, 1, 1], [0] * 7, [0, 1, 1, 2, 2, 3, 3]]
    visible = visibility(None, batch=B, queries=7, keys=7, past=0, causal=causal, position_ids=positions,
                         device=q.device, dense=name not in MASKLESS)  # fmt: skip
    out, _ = IMPLEMENTATIONS[name](q, k, v, visible, scale=0.3, dropout=0.0)
    expected = reference(q, k, v, lambda b, n, i, j: numbers[b][i] == numbers[b][j] and (not causal or j <= i), 0.3)
    torch.testing.assert_close(out, expected.to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [1, N], ids=["shared", "per-head"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_a_callers_own_mask_is_used_as_it_is(name, heads, additive):
    dtype = dtype_of(name)
    q, k, v = tensors(5, 7, dtype)
    g = torch.Generator().manual_seed(9)
    seen = torch.rand((B, heads, 5, 7), generator=g) < 0.6
    seen[1, 0, 2] = False
    mask = seen
    if additive:
        lowest = torch.finfo(dtype).min
        mask = torch.randn(seen.shape, generator=g).to(dtype).masked_fill(~seen, lowest)
    visible = visibility(mask, batch=B, queries=5, keys=7, past=2, causal=True, position_ids=None,
                         device=q.device, dense=name not in MASKLESS)  # fmt: skip
    out, _ = IMPLEMENTATIONS[name](q, k, v, visible, scale=0.3, dropout=0.0)

    def sees(b, n, i, j):
        h = n if heads > 1 else 0
        return bool(seen[b, h, i, j]) and (float(mask[b, h, i, j]) if additive else True)

    torch.testing.assert_close(out, reference(q, k, v, sees, 0.3).to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_places_given_by_a_tensor_hide_what_is_not_written(name):
    dtype = dtype_of(name)
    q, k, v = tensors(2, 9, dtype)
    visible = visibility(None, batch=B, queries=2, keys=9, past=torch.tensor([3, 4]), causal=True, position_ids=None,
                         device=q.device, dense=name not in MASKLESS)  # fmt: skip
    out, _ = IMPLEMENTATIONS[name](q, k, v, visible, scale=0.3, dropout=0.0)
    torch.testing.assert_close(out, reference(q, k, v, lambda b, n, i, j: j <= 3 + i, 0.3).to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", ["left", "blank"])
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(name, padding):
    q, k, v = tensors(7, 7, dtype_of(name), grad=True)
    mask = torch.tensor(PADDING[padding])
    visible = visibility(mask, batch=B, queries=7, keys=7, past=0, causal=True, position_ids=None,
                         device=q.device, dense=name not in MASKLESS)  # fmt: skip
    out, _ = IMPLEMENTATIONS[name](q, k, v, visible, scale=0.3, dropout=0.0)
    blind = mask.cumsum(-1) == 0
    assert blind.any() and (out.transpose(1, 2)[blind] == 0).all()
    out.float().square().sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    assert (q.grad.transpose(1, 2)[blind] == 0).all()
    assert (k.grad.transpose(1, 2)[mask == 0] == 0).all(), "a hidden key has no influence"


@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n != "eager"])
def test_gradients_equal_the_written_out_form(name):
    dtype, grads = dtype_of(name), []
    for kind in (name, "eager"):
        q, k, v = tensors(7, 7, dtype, grad=True)
        visible = visibility(torch.tensor(PADDING["left"]), batch=B, queries=7, keys=7, past=0, causal=True,
                             position_ids=None, device=q.device, dense=kind not in MASKLESS)  # fmt: skip
        out, _ = IMPLEMENTATIONS[kind](q, k, v, visible, scale=0.3, dropout=0.0)
        out.float().pow(2).sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=CLOSE[dtype]["atol"] * 5, rtol=CLOSE[dtype]["rtol"] * 5)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attention_dropout_drops_and_keeps_the_mean(name):
    q, k, v = tensors(7, 7, torch.float32)
    visible = visibility(None, batch=B, queries=7, keys=7, past=0, causal=False, position_ids=None,
                         device=q.device, dense=name not in MASKLESS)  # fmt: skip
    exact = IMPLEMENTATIONS[name](q, k, v, visible, scale=0.3, dropout=0.0)[0]
    torch.manual_seed(0)
    many = [IMPLEMENTATIONS[name](q, k, v, visible, scale=0.3, dropout=0.5)[0] for _ in range(600)]
    assert (many[0] - exact).abs().max() > 0.1
    # 600 draws of a sum of 7 weights below 1 on values below 3: a deviation of about 0.04.
    assert (torch.stack(many).mean(0) - exact).abs().max() < 0.25


# -- in a model ---------------------------------------------------------------------------------------------------


def tiny(cls=GemmaForCausalLM, dtype=torch.float32, **more):
    torch.manual_seed(0)
    settings = dict(vocab_size=40, hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=N,
                    num_key_value_heads=K, head_dim=H, max_position_embeddings=64, initializer_range=0.3)  # fmt: skip
    return cls(GemmaConfig(**{**settings, **more})).to(dtype).eval()


def written_out(model, ids, sees):
    """GemmaModel in float64 from its definition; sees(b, n, i, j) decides visibility, positions count from 0."""
    weights = {name: p.detach().double() for name, p in model.state_dict().items()}
    config = model.config
    x = weights["embed_tokens.weight"][ids] * config.hidden_size**0.5

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * (1 + weights[f"{name}.weight"])

    def turn(x):  # (B, heads, S, H): features i and i + H / 2 are a point that turns by position / theta^(2i / H)
        angles = torch.arange(x.shape[2])[:, None] / config.rope_theta ** (torch.arange(0, H, 2).double() / H)
        a, b = x[..., : H // 2], x[..., H // 2 :]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    for layer in range(config.num_hidden_layers):
        p = f"layers.{layer}"
        y = norm(x, f"{p}.input_layernorm")
        q, k, v = (
            (y @ weights[f"{p}.self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, H)).transpose(1, 2) for n in "qkv"
        )
        y = reference(turn(q), turn(k), v, sees, H**-0.5).transpose(1, 2).flatten(2)
        x = x + y @ weights[f"{p}.self_attn.o_proj.weight"].T
        y = norm(x, f"{p}.post_attention_layernorm")
        gate, up = (y @ weights[f"{p}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (torch.nn.functional.gelu(gate, approximate="tanh") * up) @ weights[f"{p}.mlp.down_proj.weight"].T
    return norm(x, "norm")


@pytest.fixture
def ids():
    return torch.randint(3, 40, (B, 7), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@torch.no_grad()
def test_a_model_equals_the_definition_under_every_implementation(name, padding, causal, ids):
    dtype = torch.bfloat16 if name == "flash_attention_2" else torch.float32
    model = tiny(GemmaModel, dtype, use_bidirectional_attention=not causal, attn_implementation=name)
    rows = PADDING[padding]
    mask = None if rows is None else torch.tensor(rows)
    got = model(ids, attention_mask=mask).last_hidden_state

    def sees(b, n, i, j):
        return (rows is None or rows[b][j] == 1) and (not causal or j <= i)

    expected = written_out(model, ids, sees)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    apart = (got.double() - expected)[real].abs().max() / expected[real].abs().max()
    # float32: rounding. bfloat16 keeps 8 bits, two layers of a dozen roundings each.
    assert apart < (0.06 if dtype == torch.bfloat16 else 1e-5)


@torch.no_grad()
def test_is_causal_of_a_call_wins_over_the_configuration(ids):
    model, other = tiny(), tiny(use_bidirectional_attention=True)
    torch.testing.assert_close(model(ids, is_causal=False).logits, other(ids).logits)
    torch.testing.assert_close(other(ids, is_causal=True).logits, model(ids).logits)
    assert not torch.allclose(model(ids).logits, other(ids).logits, atol=1e-2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("cached", ["dynamic", "static", "places"])
@torch.no_grad()
def test_cached_steps_equal_one_pass_under_every_implementation(name, cached, ids):
    dtype = torch.bfloat16 if name == "flash_attention_2" else torch.float32
    model = tiny(dtype=dtype, attn_implementation=name)
    mask = torch.tensor(PADDING["left"])
    whole = model(ids, attention_mask=mask).logits
    cache = DynamicCache() if cached == "dynamic" else StaticCache(model.config, max_cache_len=10)
    out = []
    for a, b in ((0, 4), (4, 5), (5, 7)):
        places = torch.arange(a, b) if cached == "places" else None
        out.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, cache_position=places).logits)
    got = torch.cat(out, 1)[mask.bool()]
    limit = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (got - whole[mask.bool()]).abs().max() / whole.abs().max() < limit


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@torch.no_grad()
def test_weights_come_back_whatever_the_implementation(name, ids):
    model = tiny(attn_implementation=name)  # float32 even for flash: this call is computed in the written-out form
    mask = torch.tensor(PADDING["left"])
    out = model(ids, attention_mask=mask, output_attentions=True)
    expected = tiny(attn_implementation="eager")(ids, attention_mask=mask, output_attentions=True)
    assert len(out.attentions) == 2 and out.attentions[0].shape == (B, N, 7, 7)
    for a, b in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b)
    sums = out.attentions[1].sum(-1)
    torch.testing.assert_close(sums, (mask.cumsum(-1) > 0).float()[:, None].expand(-1, N, -1))


@torch.no_grad()
def test_the_implementation_can_be_changed_at_any_time(ids):
    model = tiny()
    expected = model(ids).logits
    for name in ("eager", "flex_attention", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config.attn_implementation == name
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_what_is_not_there_is_refused(monkeypatch, ids):
    model = tiny()
    with pytest.raises(ConfigError, match="attn_implementation is 'paged'; gemmakit has eager, sdpa"):
        model.set_attn_implementation("paged")
    model.set_attn_implementation("flash_attention_2")
    with pytest.raises(InputError, match=r"float16 or bfloat16 and this model in torch\.float32"):
        model(ids)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install flash-attn"):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(MissingDependency, match="pip install flash-attn"):
        tiny(attn_implementation="flash_attention_2")


def test_a_rule_follows_layers_to_their_devices():
    rule = visibility(torch.tensor(PADDING["left"]), batch=B, queries=7, keys=7, past=0, causal=True,
                      position_ids=None, device=torch.device("cpu"), dense=False).rule  # fmt: skip
    away = rule.to(torch.device("meta"))
    assert (away.device.type, away.padding.device.type, away.causal, away.past) == ("meta", "meta", True, 0)
    assert rule.to(torch.device("meta")) is away and rule.to(torch.device("cpu")) is rule
    assert rule.memo("x", lambda: 1) == rule.memo("x", lambda: 2) == 1 and away.memo("x", lambda: 3) == 3


def test_kernels_without_masks_are_given_none(ids, monkeypatch):
    # A mask of S x T is what these kernels are chosen to avoid.
    monkeypatch.setattr("gemmakit.pytorch.masks.Rule.masked", lambda self: pytest.fail("a mask was made"))
    mask = torch.tensor(PADDING["left"])
    with torch.no_grad():
        tiny(attn_implementation="flex_attention")(ids, attention_mask=mask)
        tiny(dtype=torch.bfloat16, attn_implementation="flash_attention_2")(ids, attention_mask=mask)


@given(
    queries=st.integers(1, 6), past=st.integers(0, 9), window=st.integers(1, 12), placed=st.booleans(),
    causal=st.booleans(), whole=st.booleans(), hidden=st.integers(0, 9),
)  # fmt: skip
def test_a_window_shows_the_keys_that_are_near_and_names_no_other(queries, past, window, placed, causal, whole, hidden):
    """By brute force: before and after the query in both directions, never more columns than somebody sees."""
    keys = past + queries
    padding = torch.ones(2, keys, dtype=torch.long)
    padding[0, : min(hidden, keys - 1)] = 0
    where = torch.arange(past, keys) if placed else past
    found = visibility(
        padding, batch=2, queries=queries, keys=keys, past=where, causal=causal, window=window, position_ids=None,
        device=torch.device("cpu"), whole=whole,
    )  # fmt: skip
    place, key = torch.arange(past, keys)[:, None], torch.arange(keys)
    near = (key > place - window) & (key <= place if causal else key < place + window)
    expected = (near & padding.bool()[:, None, None]).expand(2, 1, queries, keys)
    last = keys if found.last is None else found.last
    mask = torch.ones(1, 1, queries, last, dtype=torch.bool) if found.mask is None else found.mask
    mask = mask.tril() if found.causal else mask
    mask = mask if found.blind is None else mask & ~found.blind
    seen = torch.zeros(2, 1, queries, keys, dtype=torch.bool)
    seen[..., keys - last :] = mask
    assert torch.equal(seen, expected)
    assert whole <= (last == keys)
    if causal and not placed and not whole:
        assert last <= max(window + queries - 1, queries)
    assert (found.mask is None) or not expected.all()  # what hides nothing costs no mask
