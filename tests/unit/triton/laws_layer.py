"""A whole model through the Triton seams equals its modules. Run by test_interpreted.py, in Triton's interpreter."""

import sys
from pathlib import Path

import interpreting  # noqa: F401  before triton
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))
import tiny_gemma
from tiny_gemma import far, left_padded, prompts

from gemmakit.pytorch.cache import DynamicCache, StaticCache
from gemmakit.pytorch.cache.paged import PagedCache, Span
from gemmakit.pytorch.kernels import seams
from gemmakit.pytorch.kernels.seams import PROJECTIONS
from gemmakit.pytorch.kernels.triton import gemv, launch
from gemmakit.pytorch.kernels.triton import seams as triton_seams
from gemmakit.pytorch.quantize import rounding
from gemmakit.pytorch.quantize.modules import QuantizedLinear

TRITON = {"cpu": "gemmakit.pytorch.kernels.triton.seams"}
# float32 sums in another order; bfloat16: a rounding that falls the other way (2^-8) passes through two layers.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 0.03, torch.float16: 4e-3}


def tiny(**changes):
    """Smaller still, with sizes that fill no block: the interpreter takes 10 ms and more for a program of a kernel."""
    sizes = dict(hidden_size=24, intermediate_size=20, head_dim=8, num_hidden_layers=1)
    return tiny_gemma.tiny(**{**sizes, **changes})


@pytest.fixture
def both(monkeypatch):
    """f run through the modules and through the seams."""

    def run(model, f):
        results = []
        for forms in ({}, TRITON):
            monkeypatch.setattr(seams, "FORMS", forms)
            for layer in model.model.layers:
                layer.__dict__.pop("chosen", None)
            with torch.no_grad():
                results.append(f())
        assert all(type(layer.__dict__["chosen"].seams).__name__ == "TritonSeams" for layer in model.model.layers)
        return results

    return run


def steps(model, ids, cache, placed=False, mask=None):
    """The logits of a prompt of all but two tokens, by the modules if it is long, and of those two, one by one."""
    n = ids.shape[1] - 2
    out = [model(ids[:, :n], attention_mask=None if mask is None else mask[:, :n], past_key_values=cache).logits]
    for i in range(n, ids.shape[1]):
        m = None if mask is None else mask[:, : i + 1]
        place = torch.tensor([i]) if placed else None
        out.append(
            model(ids[:, i : i + 1], attention_mask=m, past_key_values=cache, cache_position=place).logits[:, -1:]
        )
    return torch.cat(out, 1)


@pytest.mark.parametrize(("K", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (4, torch.float16)], ids=str)
def test_a_model_of_tiny_layers_equals_its_modules(both, K, dtype):
    model, ids = tiny(num_key_value_heads=K, num_hidden_layers=2).to(dtype), prompts(2, 9)
    modules, fused = both(model, lambda: steps(model, ids, DynamicCache()))
    assert far(fused, modules) < TOLERANCE[dtype]


def test_a_static_cache_that_is_told_places_on_the_device(both):
    model, ids = tiny(), prompts(2, 10)
    modules, fused = both(model, lambda: steps(model, ids, StaticCache(model.config, max_cache_len=40), placed=True))
    assert far(fused, modules) < TOLERANCE[torch.float32]


def test_left_padding_hides_the_same_keys(both):
    model = tiny()
    ids, mask = left_padded([torch.tensor(row) for row in (range(4, 13), [2, 5, 7], [2, 9])], 9)
    modules, fused = both(model, lambda: steps(model, ids, DynamicCache(), mask=mask))
    assert far(fused, modules) < TOLERANCE[torch.float32]


def test_several_positions_at_once_and_no_cache(both):
    model, ids = tiny(), prompts(1, 8)
    modules, fused = both(model, lambda: model(ids, use_cache=False).logits)
    assert far(fused, modules) < TOLERANCE[torch.float32]

    def in_two_pieces():
        cache = DynamicCache()
        return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(5, dim=1)], 1)

    again, pieces = both(model, in_two_pieces)
    assert far(pieces, again) < TOLERANCE[torch.float32]
    assert far(pieces, modules) < TOLERANCE[torch.float32]


def test_biases_and_other_activations(both):
    for act in ("gelu_erf", "relu", "silu"):
        model = tiny(attention_bias=True, hidden_act=act)
        modules, fused = both(model, lambda m=model: steps(m, prompts(2, 7), DynamicCache()))
        assert far(fused, modules) < TOLERANCE[torch.float32]


def test_an_activation_of_the_users_own_follows_the_projections(both):
    model = tiny()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.sin
    modules, fused = both(model, lambda: steps(model, prompts(2, 8), DynamicCache()))
    assert far(fused, modules) < TOLERANCE[torch.float32]


def test_pages_serve_rows_of_different_lengths(both):
    model = tiny()

    def run():
        cache = PagedCache(model.config, 8, 16, torch.float32)
        first, second = [1, 2], [3]
        for pages, ids in ((first, prompts(1, 17)), (second, prompts(1, 5, seed=3))):
            cache.place([Span(pages, 0, ids.shape[1])])
            model(ids, past_key_values=cache)
        where = cache.place([Span(first, 17, 18), Span(second, 5, 6)])
        ids = prompts(2, 1)
        return model(ids, attention_mask=where.mask, position_ids=where.positions, past_key_values=cache).logits

    modules, fused = both(model, run)
    assert far(fused, modules) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("bits", "mixed"), [(8, False), (4, False), (4, True)])
def test_layers_in_8_and_4_bits(both, bits, mixed):
    """mixed: a projection left as it was, so that neither q, k, v nor gate and up have one format."""
    model = tiny(hidden_size=32, intermediate_size=40)
    layer = model.model.layers[0]
    for name in PROJECTIONS:
        parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        if mixed and name in ("k_proj", "up_proj"):
            continue
        module = getattr(parent, name)
        packed = rounding.quantize(module.weight.detach(), bits, 32 if bits == 4 else None, name=name)
        setattr(parent, name, QuantizedLinear(packed, module.bias))
    with torch.no_grad():
        assert (launch.operand(seams.weight_of(layer.mlp.down_proj)).form == gemv.INT4) == (bits == 4)
    modules, fused = both(model, lambda: steps(model, prompts(2, 7), DynamicCache()))
    # The CPU's kernel rounds the inputs to 16 bits in blocks of 32 (2^-16 of the block's largest).
    assert far(fused, modules) < 2e-4


def test_only_attention_that_the_kernel_describes_takes_it(monkeypatch):
    """An additive mask goes through torch, cache and all."""
    model, ids = tiny(), prompts(1, 1)
    monkeypatch.setattr(seams, "FORMS", TRITON)
    called = []
    monkeypatch.setattr(launch, "attend", lambda *a, **k: called.append(1))
    with torch.no_grad():
        out = model(ids, attention_mask=torch.zeros(1, 1, 1, 1), past_key_values=DynamicCache())
        expected = model(ids, past_key_values=None, attention_mask=torch.zeros(1, 1, 1, 1), output_attentions=True)
    assert not called
    assert far(out.logits, expected.logits) < TOLERANCE[torch.float32]


def test_weights_of_another_dtype_are_refused_in_words():
    layer = tiny().model.layers[0]
    layer.mlp.down_proj.to(torch.bfloat16)
    assert triton_seams.fused(layer, torch.zeros(1, 1, 24)) == (
        "down_proj is in torch.bfloat16 and the activations in torch.float32"
    )
    layer = tiny(attention_bias=True).model.layers[0].to(torch.bfloat16)
    layer.self_attn.k_proj.bias.data = layer.self_attn.k_proj.bias.data.float()
    assert "k_proj is with a bias in torch.float32" in str(
        triton_seams.fused(layer, torch.zeros(1, 1, 24, dtype=torch.bfloat16))
    )
    assert "float64" in str(triton_seams.fused(layer, torch.zeros(1, 1, 24, dtype=torch.float64)))
