"""Models in gemmakit's own int8 and int4 stay ordinary models, and their files are read as strictly as others."""

import copy
import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemmakit
from gemmakit.errors import CheckpointError, ConfigError, InputError, TokenOutOfRange
from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.quantize import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from gemmakit.quantization import SHORT_NAMES, parse_quantization

# Ragged: neither 32 nor 128 divides every size.
SHAPE = dict(vocab_size=90, hidden_size=72, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=20, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
# More rows than the kernels for a few, which also round activations, take.
IDS = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(1))
IDS[:, 0] = 2
UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
KINDS = ["int8", "int6", "int5", "int4", "int4-g128"]


def make(folder, kind=gemmakit.GemmaForCausalLM, **changes):
    torch.manual_seed(0)
    kind(gemmakit.GemmaConfig(**{**SHAPE, **changes})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain"))


def load(folder, how=None, kind=gemmakit.GemmaForCausalLM, **more):
    return kind.from_pretrained(folder, quantization_config=how, **more)


@pytest.fixture
def model(plain):
    return load(plain, "int4")


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def expanded(model, folder):
    """The plain model of the weights that the codes stand for."""
    out = load(folder)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            out.get_submodule(name).weight.data = module.dequantized()
    out.tie_weights()
    return out


# -- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", 3), ("bits", True), ("bits", 8.0), ("bits", "8"), ("group_size", 64), ("group_size", 0),
     ("head_bits", 16), ("head_bits", False), ("modules_to_not_convert", "lm_head"),
     ("modules_to_not_convert", ["("]), ("calibration", "awq")],
)  # fmt: skip
def test_an_impossible_value_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        gemmakit.WeightOnlyConfig(**{field: value})


def test_the_dictionary_comes_back_with_keys_from_tomorrow():
    values = {**gemmakit.WeightOnlyConfig(bits=4, group_size=128).to_dict(), "from_tomorrow": [1]}
    assert values["quant_method"] == "gemmakit"
    assert gemmakit.WeightOnlyConfig.from_dict(values).to_dict() == values


@pytest.mark.parametrize(
    "how", [gemmakit.WeightOnlyConfig(bits=4), {"bits": 4}, "int4-g32"], ids=["own", "dict", "text"]
)
def test_configuration_dictionary_and_short_name_are_alike(plain, model, how):
    other = load(plain, how)
    assert other.quantization_config == model.quantization_config
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_an_unknown_short_name_is_refused(plain):
    with pytest.raises(ConfigError, match="int3"):
        load(plain, "int3")


def test_calibration_cannot_be_asked_of_a_plain_load(plain):
    with pytest.raises(InputError, match="needs a text"):
        load(plain, gemmakit.WeightOnlyConfig(bits=4, calibration="gptq"))


# -- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", KINDS)
def test_logits_are_those_of_the_weights_that_the_codes_stand_for(plain, how):
    quantized = load(plain, how)
    exact = logits(expanded(quantized, plain))
    # With activations in 8 bits, which are off by half a step in 127 of their block's largest, two layers long.
    assert float((logits(quantized) - exact).abs().max() / exact.abs().max()) < 0.06
    wanted = parse_quantization(how)
    wanted.activation_bits = 16
    # The same products in float32, summed in another order.
    assert float((logits(load(plain, wanted)) - exact).abs().max() / exact.abs().max()) < 1e-4
    assert not torch.equal(exact, logits(load(plain)))


def test_activation_bits_are_kept_in_the_checkpoint_and_reach_every_weight(plain, tmp_path):
    load(plain, gemmakit.WeightOnlyConfig(bits=4, activation_bits=16)).save_pretrained(tmp_path)
    stored = load(tmp_path)
    assert stored.quantization_config.activation_bits == 16
    assert {m.packed.activation_bits for m in stored.modules() if isinstance(m, QuantizedLinear)} == {16}
    asked = load(tmp_path, gemmakit.WeightOnlyConfig(bits=4))  # the call decides how to compute
    assert asked.model.layers[0].mlp.up_proj.packed.activation_bits == 8
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["activation_bits"]  # as older checkpoints are
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).quantization_config.activation_bits == 8
    with pytest.raises(ConfigError, match="activation_bits is 4; it must be one of 8, 16"):
        gemmakit.WeightOnlyConfig(activation_bits=4)


def test_steps_in_8_bits_are_asked_for_by_name_or_call_and_kept_in_the_checkpoint(plain, tmp_path):
    load(plain, "int4-a8").save_pretrained(tmp_path)
    stored = load(tmp_path)
    assert stored.quantization_config.decode_activation_bits == 8
    assert {m.packed.decode_activation_bits for m in stored.modules() if isinstance(m, QuantizedLinear)} == {8}
    asked = load(tmp_path, "int4")
    assert {m.packed.decode_activation_bits for m in asked.modules() if isinstance(m, QuantizedLinear)} == {16}
    if cpu.library() is not None:
        with torch.no_grad():
            rounded, finer = logits(stored, IDS[:1, :6]), logits(asked, IDS[:1, :6])
        assert not torch.equal(rounded, finer)
        assert float((rounded - finer).abs().max() / finer.abs().max()) < 0.06  # as above
    with pytest.raises(ConfigError, match="decode_activation_bits is 8 and activation_bits 16"):
        gemmakit.WeightOnlyConfig(bits=4, activation_bits=16, decode_activation_bits=8)
    with pytest.raises(ConfigError, match="decode_activation_bits is 4; it must be one of 8, 16"):
        gemmakit.WeightOnlyConfig(bits=4, decode_activation_bits=4)


def test_embedding_rows_are_rounded_and_scaled_as_a_plain_model_does(plain):
    quantized = load(plain, "int8", dtype=torch.bfloat16)
    rows = quantized.model.embed_tokens.dequantized(torch.bfloat16)
    expected = rows[IDS] * torch.tensor(72**0.5, dtype=torch.bfloat16)
    found = quantized.model.embed_tokens(IDS)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_facts(model, plain):
    assert model.is_quantized and model.is_loaded_in_4bit and not model.is_loaded_in_8bit
    assert model.dtype == torch.float32
    assert model.num_parameters() == load(plain).num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == load(plain).num_parameters(exclude_embeddings=True)
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(kinds) == 15 and set(kinds.values()) == {QuantizedLinear}
    assert "int4, groups of 32" in repr(model) and "int8, rows" in repr(model)
    plan = model.decode_plan()
    assert "int4" in plan["up_proj"] and "int8" in plan["lm_head"]


def one_matrix(model):
    head, embedding = model.lm_head, model.model.embed_tokens
    return (
        isinstance(head, QuantizedLinear)
        and isinstance(embedding, QuantizedEmbedding)
        and head.weight is embedding.weight
        and head.weight_scale is embedding.weight_scale
        and head.weight_zero is embedding.weight_zero
    )


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [{"bits": 8}, {"bits": 4, "head_bits": 4}], ids=["8", "4"])
def test_the_tie_survives_saving_copying_pickling_and_moving(plain, how, tmp_path):
    model = load(plain, how)
    assert one_matrix(model)
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("lm_head")]
    before = logits(model)
    for other in (load(tmp_path), copy.deepcopy(model), pickled(model), model.to("cpu")):
        assert one_matrix(other)
        assert torch.equal(logits(other), before)
    # A move that makes new tensors, as one to another device does.
    moved = copy.deepcopy(model)._apply(torch.clone)
    assert one_matrix(moved) and torch.equal(logits(moved), before)


def test_an_adapter_wrapper_cannot_cast_the_scales(model):
    before = model.model.layers[0].mlp.up_proj.weight_scale.clone()
    torch.nn.Module.to(model, torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype == torch.float16 and torch.equal(layer.weight_scale, before)
    assert model.model.embed_tokens.weight_scale.dtype == torch.float32


def test_casts_are_refused(model):
    for cast in (lambda: model.to(torch.bfloat16), model.half, model.float, model.bfloat16, model.double):
        with pytest.raises(InputError, match="quantized model cannot be cast"):
            cast()


@pytest.mark.parametrize("how", KINDS)
def test_generation_is_the_same_by_every_cache_and_in_batches(plain, how):
    # The engine rounds prompts to 8 bits where generate may not: of two tokens that near, either may be the larger.
    model = load(plain, {**SHORT_NAMES[how], "activation_bits": 16})
    more = dict(max_new_tokens=5, do_sample=False)
    rows = [model.generate(IDS[i : i + 1], **more)[0].tolist() for i in range(3)]
    assert model.generate(IDS[:1], cache_implementation="static", **more)[0].tolist() == rows[0]
    assert model.generate(IDS[:1], num_beams=3, **more).shape[0] == 1
    results = model.generate_batch([row.tolist() for row in IDS], **more)
    assert [r.new_ids for r in results] == [row[12:] for row in rows]


def test_hooks_see_every_projection(model):
    seen = []
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(lambda m, a, out: seen.append(out.shape[-1]))
    model.generate(IDS[:1], max_new_tokens=2, do_sample=False)
    assert len(seen) >= 2 * 15


@pytest.mark.parametrize("bad", [-1, 90])
def test_an_id_outside_the_vocabulary_is_named(model, bad):
    with pytest.raises(TokenOutOfRange, match=str(bad)):
        model(torch.tensor([[3, bad]]))


def test_modules_are_kept_by_name(plain):
    kept = load(plain, {"bits": 4, "head_bits": None, "modules_to_not_convert": ["q_proj", "model.layers.1"]})
    packed = {name for name, m in kept.named_modules() if isinstance(m, QuantizedWeight)}
    assert packed == {f"model.layers.0.{n}" for n in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                                      "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    assert torch.equal(kept.lm_head.weight, load(plain).lm_head.weight)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_keeping_one_of_two_tied_modules_keeps_both(plain, name):
    kept = load(plain, {"bits": 8, "modules_to_not_convert": [name]})
    assert kept.lm_head.weight is kept.model.embed_tokens.weight and kept.lm_head.weight.is_floating_point()


def test_an_untied_head_has_codes_of_its_own(tmp_path):
    folder = make(tmp_path / "plain", tie_word_embeddings=False)
    model = load(folder, "int4")
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert again.lm_head.bits == 8 and not one_matrix(again)
    assert torch.equal(logits(again), logits(model))


def test_classification_heads_are_kept_and_base_models_exchange_files(tmp_path, saved, model):
    folder = make(tmp_path / "classifier", gemmakit.GemmaForSequenceClassification, num_labels=3)
    classifier = load(folder, "int4", gemmakit.GemmaForSequenceClassification)
    assert type(classifier.score).__name__ == "Linear" and classifier.score.weight.is_floating_point()
    base = gemmakit.GemmaModel.from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(load(tmp_path / "base")), logits(model))


def test_biases_come_along(tmp_path):
    model = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**SHAPE, attention_bias=True))
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    model.save_pretrained(tmp_path / "plain")
    quantized = load(tmp_path / "plain", "int8")
    quantized.save_pretrained(tmp_path / "packed")
    for other in (quantized, load(tmp_path / "packed")):
        assert torch.equal(other.model.layers[0].self_attn.q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)


# -- embeddings and heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [True, False])
def test_resizing_keeps_rows_and_tie(model, mean):
    before = model.model.embed_tokens.dequantized()
    model.resize_token_embeddings(100, mean_resizing=mean)
    after = model.model.embed_tokens.dequantized()
    assert one_matrix(model) and model.config.vocab_size == 100
    assert torch.equal(after[:90], before)
    assert logits(model).shape[-1] == 100
    if mean:  # rounded to codes of its own: half a step of the largest
        step = model.model.embed_tokens.weight_scale[95]
        assert (after[95] - before.mean(0)).abs().max() <= step * 0.51
    model.resize_token_embeddings(80)
    assert torch.equal(model.model.embed_tokens.dequantized(), before[:80]) and one_matrix(model)


def test_untying_gives_the_head_its_own_codes(model, tmp_path):
    before = logits(model)
    model.untie_weights()
    model.lm_head.weight.data.zero_()
    assert float(logits(model).abs().max()) == 0 and not torch.equal(
        model.model.embed_tokens.weight, model.lm_head.weight
    )
    model.save_pretrained(tmp_path)
    assert float(logits(load(tmp_path)).abs().max()) == 0 and before.abs().max() > 0


def test_a_plain_embedding_takes_the_head_along(model):
    new = torch.nn.Embedding(90, 72)
    model.set_input_embeddings(new)
    assert model.lm_head.weight is new.weight and logits(model).shape == (3, 12, 90)


def test_pruning_is_refused(model):
    with pytest.raises(InputError, match="cannot be pruned"):
        model.prune_heads({0: [0]})


# -- training ------------------------------------------------------------------------------------------------------


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "gate_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return wrapped.train()


@pytest.mark.parametrize("how", KINDS)
def test_adapters_alone_learn_with_the_gradients_of_the_expanded_weights(plain, how):
    quantized = load(plain, how)
    exact = adapted(expanded(quantized, plain))
    ours = adapted(quantized)
    for wrapped in (ours, exact):
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert found and all("lora_" in name for name in found)
    assert not any(p.requires_grad for n, p in ours.named_parameters() if "lora_" not in n)
    expected = dict(exact.named_parameters())
    for name, gradient in found.items():
        limit = 1e-4 * expected[name].grad.abs().max()  # float32, summed in another order
        assert (gradient - expected[name].grad).abs().max() <= limit, name


def test_backward_keeps_no_expanded_weight(model):
    """What a projection saves for its backward pass is codes and small tables."""
    layer, kept = model.model.layers[0].mlp.up_proj, []
    x = torch.randn(20, 72, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert not [t.shape for t in kept if t.is_floating_point() and t.numel() >= layer.weight.numel() * 2]
    assert torch.allclose(x.grad, layer.dequantized().sum(0).expand_as(x.grad), rtol=1e-4, atol=1e-4)


def test_adapters_are_saved_apart_and_come_back(plain, tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = adapted(load(plain, "int4")).eval()
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(plain, "int4"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, wrapped(input_ids=IDS).logits)


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", KINDS)
def test_saved_and_loaded_is_the_same_model(plain, how, dtype, tmp_path):
    model = load(plain, how, dtype=dtype)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.dtype == dtype and again.quantization_config == model.quantization_config
    mine, other = model.state_dict(), again.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
    assert torch.equal(logits(again), logits(model))


def test_codes_come_from_the_stored_numbers_whatever_the_compute_dtype(plain):
    a, b = (load(plain, "int4", dtype=d).model.layers[0].mlp.up_proj for d in (torch.float32, torch.bfloat16))
    assert torch.equal(a.weight, b.weight) and torch.equal(a.weight_scale, b.weight_scale)


def change(folder, edit):
    tensors = dict(load_file(folder / "model.safetensors"))
    edit(tensors)
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(UP), "lacks model.layers.0.mlp.up_proj.weight"),
        (lambda t: t.pop(f"{UP}_scale"), "up_proj.weight in .* lacks its weight_scale"),
        (lambda t: t.pop(f"{UP}_zero"), "lacks its weight_zero"),
        (lambda t: t.pop(f"{EMBEDDING}_scale"), "lacks its weight_scale"),
        (lambda t: t.update({f"{EMBEDDING}_zero": torch.zeros(90, 1).byte()}), "no use for its weight_zero"),
        (lambda t: t.update({f"{UP}_surprise": torch.ones(2)}), "surprise"),
        (lambda t: t.update({UP: t[UP][:-1]}), r"159 rows, but its weight_scale has 160"),
        (lambda t: t.update({UP: t[UP][:, :-16]}), r"has shape \(160, 64\)"),
        (lambda t: t.update({UP: t[UP].view(torch.int8)}), "needs a weight of uint8"),
        (lambda t: t.update({UP: t[UP][0]}), "not a matrix"),
        (lambda t: t.update({f"{UP}_scale": t[f"{UP}_scale"].float()}), "needs a weight_scale of float16"),
        (lambda t: t.update({f"{UP}_scale": t[f"{UP}_scale"][:, :-1]}), r"\(160, 3\) by its config.json"),
        (lambda t: t.update({f"{UP}_zero": t[f"{UP}_zero"] + 16}), "weight_zero above 15"),
        (lambda t: t.update({f"{EMBEDDING}_scale": t[f"{EMBEDDING}_scale"].half()}), "weight_scale of float32"),
        (lambda t: [t.pop(k) for k in (UP, f"{UP}_scale", f"{UP}_zero")], "lacks model.layers.0.mlp.up_proj.weight"),
    ],
)  # fmt: skip
def test_damage_is_named(saved, edit, message):
    change(saved, edit)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def settings(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"bits": 8, "group_size": None}, "needs a weight of int8|has shape"), ({"group_size": 128}, "weight_scale"),
     ({"head_bits": None}, "is quantized, but config.json says that it was kept"), ({"bits": 3}, "bits is 3"),
     ({"quant_method": "gptq"}, "gptq")],
)  # fmt: skip
def test_a_config_of_another_layout_is_refused(saved, changes, message):
    settings(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_a_config_that_promises_quantized_weights_is_held_to_it(plain, saved):
    (saved / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no quantized weights"):
        load(saved)


def test_the_call_cannot_ask_for_another_layout_than_the_files(saved):
    assert load(saved, "int4").is_quantized
    for other in ("int8", "int4-g128", {"load_in_4bit": True}):
        with pytest.raises(InputError, match="the checkpoint holds 4-bit weights of gemmakit"):
            load(saved, other)
