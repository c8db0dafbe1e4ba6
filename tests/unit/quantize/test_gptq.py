"""Codes chosen by their effect on a text lose less than codes chosen weight by weight."""

import pytest
import torch
from demo_texts import divergence, texts

import gemmakit
from gemmakit.errors import InputError, NumericalError
from gemmakit.pytorch.kernels.packed import dequantize
from gemmakit.pytorch.quantize import QuantizedLinear, gptq, rounding
from gemmakit.pytorch.quantize.own import WeightOnlyQuantizer

LAYOUTS = [(8, None), (8, 32), (6, 32), (5, 32), (4, 32), (4, 128)]


def inputs(tokens, width, seed=0):
    """Correlated, and of very different size: what makes calibration worth while."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 2, width, generator=generator)
    x = torch.randn(tokens, width // 2, generator=generator) @ mix + 0.1 * torch.randn(
        tokens, width, generator=generator
    )
    return x * torch.rand(width, generator=generator) ** 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("width", [70, 256])
def test_the_outputs_are_nearer_on_texts_that_were_not_seen(layout, width):
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(1))
    seen, unseen = inputs(2000, width).split(1000)
    plain, chosen = rounding.quantize(weight, *layout), gptq.gptq(weight, seen.T @ seen, *layout)
    lost = [(unseen @ (dequantize(p) - weight).T).square().mean() for p in (plain, chosen)]
    assert lost[1] < 0.7 * lost[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_independent_inputs_leave_each_weight_at_its_nearest_code(layout):
    weight, sizes = torch.randn(16, 100), torch.rand(100) + 0.1
    expected = rounding.quantize(weight, *layout, importance=sizes)
    found = gptq.gptq(weight, sizes.diag(), *layout)
    for a, b in zip(expected[:3], found[:3], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_inputs_that_are_always_zero_do_no_harm():
    weight, x = torch.randn(8, 64), inputs(300, 64)
    x[:, 10:20] = 0
    back = dequantize(gptq.gptq(weight, x.T @ x, 4, 32))
    assert torch.isfinite(back).all()
    assert (back - weight)[:, 10:20].abs().max() < 1


def test_blocks_of_any_size_give_the_same_codes(monkeypatch):
    weight, x = torch.randn(8, 100), inputs(300, 100)
    whole = gptq.gptq(weight, x.T @ x, 4, 32)
    monkeypatch.setattr(gptq, "BLOCK", 7)
    # The updates are summed in another order: a code at the middle between two may fall to the other side.
    assert (gptq.gptq(weight, x.T @ x, 4, 32).codes != whole.codes).float().mean() < 0.01


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_chosen_by_a_text_loses_less_and_hardly_more_where_it_is_looked_up(tied, tmp_path):
    demo = gemmakit.demo_model()
    exact, model = (gemmakit.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32) for _ in "ab")
    assert exact.config.tie_word_embeddings
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    seen, unseen = texts(gemmakit.AutoTokenizer.from_pretrained(demo), 16).split(8)
    weight = model.lm_head.weight.detach().clone()
    lost, errors = [], []
    for packed in (rounding.quantize(weight, 5, 32), gptq.head_weight(model, seen, (5, 32))):
        model.lm_head.weight.data = dequantize(packed)
        lost.append(divergence(exact, model, unseen))
        errors.append((model.lm_head.weight - weight).square().mean())
        model.lm_head.weight.data = weight
    assert lost[1] < 0.85 * lost[0]
    if tied:
        assert errors[1] < 2 * errors[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = gemmakit.GemmaConfig(
        vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2, attention_bias=True,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("plain")
    gemmakit.GemmaForCausalLM(config).save_pretrained(out)
    return out


IDS = torch.randint(3, 90, (24, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def drift(model, exact, ids):
    a, b = (m(ids).logits.log_softmax(-1) for m in (exact, model))
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_a_calibrated_model_is_nearer_to_the_plain_one(folder):
    load = gemmakit.GemmaForCausalLM.from_pretrained
    exact, unseen = load(folder), IDS[16:]
    for how in ({"bits": 4, "head_bits": None}, {"bits": 4, "group_size": 128, "head_bits": None}):
        model, plain = load(folder), load(folder, quantization_config=how)
        gptq.calibrate(model, IDS[:16], WeightOnlyQuantizer(plain.quantization_config, True))
        assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14
        assert drift(model, exact, unseen) < drift(plain, exact, unseen)


@torch.no_grad()
def test_every_layer_meets_its_own_window_and_rotary_table():
    """The last layer's codes are those of the inputs that the model itself gives it."""
    config = gemmakit.Gemma3TextConfig(
        vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = gemmakit.Gemma3ForCausalLM(config).eval()
    name = "layers.1.self_attn.o_proj"
    others = [n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear) and n != name]
    layer, seen = model.model.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    model(IDS)
    handle.remove()
    x, weight = torch.cat(seen), layer.weight.clone()
    settings = gemmakit.WeightOnlyConfig(bits=4, group_size=32, head_bits=None, modules_to_not_convert=others)
    gptq.calibrate(model, IDS, WeightOnlyQuantizer(settings, True))
    found, expected = model.model.get_submodule(name), gptq.gptq(weight, x.T @ x, 4, 32)
    # The sums of x^T x have another order: a code at the middle between two may fall to the other side.
    assert (found.packed.codes != expected.codes).float().mean() < 0.01


def test_layers_keep_their_dtype_and_biases(folder):
    model = gemmakit.GemmaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    gptq.calibrate(model, IDS[:4], WeightOnlyQuantizer(gemmakit.WeightOnlyConfig(bits=8), True))
    kept = model.model.layers[0].self_attn.q_proj.bias
    assert kept.dtype == torch.bfloat16 and torch.equal(kept, bias)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.int8}


def test_ids_of_another_shape_and_broken_weights_are_refused(folder):
    model = gemmakit.GemmaForCausalLM.from_pretrained(folder)
    quantizer = WeightOnlyQuantizer(gemmakit.WeightOnlyConfig(bits=4), True)
    for ids in (IDS[0], IDS.float(), IDS[:0]):
        with pytest.raises(InputError, match="calibration_ids"):
            gptq.calibrate(model, ids, quantizer)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="q_proj is not finite"):
        gptq.calibrate(model, IDS, quantizer)
