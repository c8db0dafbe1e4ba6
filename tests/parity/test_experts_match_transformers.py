"""Gemma 4's mixture of experts against transformers, whose own loop over experts ("eager") is the oracle.

FLOAT32, GRADIENTS: as in test_family_matches_transformers; sums of three experts more.
"""

from __future__ import annotations

import copy

import pytest
import torch
from parity_tools import apart, batch
from tiny_shapes import COMMON, MEMBERS, SHAPES, WINDOW

import gemmakit
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.checkpoint.inspect import inspect
from gemmakit.errors import ConfigError, InputError
from gemmakit.pytorch.experts import GemmaExperts
from gemmakit.pytorch.kernels.packed import dequantize
from gemmakit.pytorch.layers import Linear
from gemmakit.pytorch.parallel.tensor import TensorPlan
from gemmakit.pytorch.quantize.modules import QuantizedExperts, QuantizedWeight
from gemmakit.text.gguf import vocabulary_of

LENGTH = 3 * WINDOW + 3
FLOAT32 = 4e-5
MIXED = dict(enable_moe_block=True, num_experts=7, top_k_experts=3, moe_intermediate_size=20)
DENSE = dict(hidden_size_per_layer_input=0, num_kv_shared_layers=0, use_double_wide_mlp=False, num_hidden_layers=3,
             layer_types=["sliding_attention", "full_attention", "full_attention"])  # fmt: skip
# As released, and beside everything else that Gemma 4 has.
FORMS = {"dense": {**MIXED, **DENSE}, "all": MIXED}


@pytest.fixture
def mixed(pair):
    def make(form="dense", shape="gqa", dtype=torch.float32, **more):
        both = pair(shape, member="gemma4_text", dtype=dtype, **FORMS[form], **more)
        both.theirs.set_experts_implementation("eager")
        return both

    return make


def run(model, ids, mask=None, **more):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **more)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_one_pass_equal_the_oracle_to_the_bit(mixed, form, dtype):
    both = mixed(form, dtype=dtype)
    ids, _ = batch("none", rows=2, width=LENGTH)
    ours, theirs = (run(model, ids, use_cache=False).logits for model in (both.ours, both.theirs))
    assert torch.equal(ours, theirs)
    assert any(isinstance(module, GemmaExperts) for module in both.ours.modules())


def test_greedy_tokens_and_beams_are_the_oracles_past_several_windows(mixed):
    both = mixed(tie_word_embeddings=False)
    ids, mask = batch("left", width=11)
    for more in ({}, {"num_beams": 2}):
        asked = dict(attention_mask=mask, max_new_tokens=3 * WINDOW, do_sample=False, eos_token_id=None, **more)
        assert torch.equal(both.ours.generate(ids, **asked), both.theirs.generate(ids, **asked))


def test_steps_through_a_cache_and_rows_of_a_batch_equal_a_pass_alone(mixed):
    both = mixed("all")
    ids, mask = batch("left", width=LENGTH)
    whole = run(both.ours, ids, mask, use_cache=False).logits
    cache, start = gemmakit.DynamicCache(), 0
    for size in (9, 1, 1, 3, 1, LENGTH - 15):
        end = start + size
        step = run(both.ours, ids[:, start:end], mask[:, :end], past_key_values=cache).logits
        assert apart(step, whole[:, start:end], mask[:, start:end]) < FLOAT32
        start = end
    for row in range(len(ids)):
        real = mask[row].bool()
        assert apart(run(both.ours, ids[row : row + 1, real]).logits, whole[row : row + 1, real]) < FLOAT32


def test_loss_and_every_gradient_equal_the_oracle(mixed):
    both = mixed("all")
    ids, _ = batch("none", width=LENGTH)
    for model in (both.ours, both.theirs):
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    theirs = dict(both.theirs.named_parameters())
    overall = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, parameter in both.ours.named_parameters():
        other = theirs[name].grad
        assert float((parameter.grad - other).abs().max()) <= 2e-6 * overall, name
    routers = [p.grad for name, p in both.ours.named_parameters() if "router" in name]
    assert routers and all(bool(grad.any()) for grad in routers)


def test_a_decoding_step_reads_the_weights_of_the_chosen_experts_alone(mixed):
    """The others hold NaN, which any product with them would show."""
    both = mixed()
    ids = torch.tensor([[2, 9]])
    before = run(both.ours, ids, use_cache=False).logits
    layer = both.ours.model.layers[1]
    chosen: set[int] = set()
    layer.router.register_forward_hook(lambda _, __, out: chosen.update(out[0].flatten().tolist()))
    run(both.ours, ids, use_cache=False)
    assert 3 <= len(chosen) <= 6
    with torch.no_grad():
        kept = layer.experts.gate_up_proj.clone(), layer.experts.down_proj.clone()
        try:
            for expert in {*range(7)} - chosen:
                layer.experts.gate_up_proj[expert] = layer.experts.down_proj[expert] = torch.nan
            assert torch.equal(run(both.ours, ids, use_cache=False).logits, before)
        finally:
            layer.experts.gate_up_proj.copy_(kept[0])
            layer.experts.down_proj.copy_(kept[1])
            layer.router._forward_hooks.clear()


def test_the_form_for_compilers_is_the_same_sum(mixed):
    experts = mixed().ours.model.layers[0].experts
    x = torch.randn(5, 48)
    chosen = torch.stack([torch.randperm(7)[:3] for _ in range(5)])
    shares = torch.rand(5, 3)
    with torch.no_grad():
        assert torch.allclose(experts._at_once(x, chosen, shares), experts(x, chosen, shares), rtol=1e-5, atol=1e-5)


def test_weights_travel_both_ways(mixed, tmp_path):
    both = mixed()
    both.ours.save_pretrained(tmp_path)
    again = type(both.theirs).from_pretrained(tmp_path)
    for name, tensor in both.theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert gemmakit.AutoConfig.from_pretrained(tmp_path) == both.ours.config


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_in_few_bits_compute_what_their_codes_stand_for(mixed, tmp_path, bits):
    """1e-3: the products of packed weights round what they read to 16 bits in blocks of 32."""
    both = mixed()
    config = gemmakit.WeightOnlyConfig(bits=bits, activation_bits=16)
    rounded = gemmakit.GemmaForCausalLM.from_pretrained(both.folder, quantization_config=config)
    plain = gemmakit.GemmaForCausalLM.from_pretrained(both.folder)
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, QuantizedWeight):
                plain.get_parameter(f"{name}.weight").copy_(module.dequantized())
            for matrix, packed in (module.matrices if isinstance(module, QuantizedExperts) else {}).items():
                stored = plain.get_parameter(f"{name}.{matrix}")
                stored.copy_(dequantize(packed).view_as(stored))
    numbers = copy.deepcopy(rounded).dequantize().state_dict()
    assert all(torch.equal(numbers[name], tensor) for name, tensor in plain.state_dict().items())
    ids, _ = batch("none", rows=2, width=LENGTH)
    assert apart(run(rounded, ids).logits, run(plain, ids).logits) < 1e-3
    assert rounded.num_parameters() == plain.num_parameters()
    experts = rounded.model.layers[1].experts
    assert set(experts.matrices) == {"gate_up_proj", "down_proj"}
    assert type(rounded.model.layers[1].router.proj) is Linear  # a choice is not worth the few bits
    x, chosen, shares = torch.randn(4, 48), torch.tensor([[1, 4], [0, 6], [2, 3], [5, 1]]), torch.rand(4, 2)
    assert torch.allclose(experts._at_once(x, chosen, shares), experts(x, chosen, shares), rtol=1e-2, atol=1e-2)
    rounded.save_pretrained(tmp_path / "saved")
    gemmakit.quantize_checkpoint(both.folder, tmp_path / "streamed", config)
    for folder in ("saved", "streamed"):
        assert not inspect(tmp_path / folder).problems
        again = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        for name, tensor in rounded.state_dict().items():
            assert torch.equal(again[name], tensor), (folder, name)
    scale = experts.gate_up_proj_scale.clone()
    assert torch.equal(experts.to(torch.bfloat16).gate_up_proj_scale, scale)  # part of the stored weight


def test_what_does_not_run_is_refused_by_name(mixed, tmp_path):
    both = mixed()
    with pytest.raises(InputError, match=r"7 experts in each layer.*bitsandbytes does not round"):
        gemmakit.GemmaForCausalLM.from_pretrained(
            both.folder, quantization_config=gemmakit.BitsAndBytesConfig(load_in_8bit=True)
        )
    with pytest.raises(InputError, match="7 experts in each layer"):
        gemmakit.quantize_checkpoint(both.folder, tmp_path / "q", "int4", calibration_ids=torch.full((1, 8), 5))
    with pytest.raises(InputError, match="a tensor plan does not split"):
        TensorPlan(both.ours.config, 0, 2)
    sizes = {**COMMON, **SHAPES["gqa"], **MEMBERS["gemma4_text"], **MIXED}
    with pytest.raises(ConfigError, match="num_experts is None"):
        gemmakit.Gemma4TextConfig(**{**sizes, "num_experts": None})
    with pytest.raises(ConfigError, match="top_k_experts is 8"):
        gemmakit.Gemma4TextConfig(**{**sizes, "top_k_experts": 8})
    plan = both.ours.decode_plan()
    assert "experts stand beside its MLP" in plan["seams"]
    assert plan["experts"] == "3 of 7 a token, read one by one"
    vocabulary = vocabulary_of(gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model()))
    with pytest.raises(ConfigError, match="7 experts"):
        write_gguf(tmp_path / "x.gguf", gemmakit.Gemma4TextConfig(**{**sizes, "vocab_size": 2048}), {}, vocabulary)
