"""Models quantized by bitsandbytes stay ordinary models, and their files are read as strictly as others."""

import copy
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemmakit
from gemmakit.errors import CheckpointError, ConfigError, InputError, MissingDependency

bnb = pytest.importorskip("bitsandbytes")

SHAPE = dict(vocab_size=80, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=32, max_position_embeddings=64)  # fmt: skip
NF4 = gemmakit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
IDS = torch.arange(2, 12)[None]
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**SHAPE, initializer_range=0.2)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(plain):
    return gemmakit.GemmaForCausalLM.from_pretrained(plain, quantization_config=NF4)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# -- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("load_in_4bit", 1), ("bnb_4bit_quant_type", "nf5"), ("bnb_4bit_compute_dtype", torch.int8),
     ("bnb_4bit_quant_storage", "int3"), ("llm_int8_threshold", -1.0), ("llm_int8_threshold", float("nan")),
     ("llm_int8_skip_modules", "lm_head"), ("llm_int8_skip_modules", ["("]), ("bnb_4bit_use_double_quant", None)],
)  # fmt: skip
def test_an_impossible_value_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        gemmakit.BitsAndBytesConfig(**{field: value})


def test_both_widths_at_once_are_refused():
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit"):
        gemmakit.BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)


def test_unknown_keys_of_a_file_are_written_back():
    values = {**NF4.to_dict(), "from_tomorrow": [1]}
    assert gemmakit.BitsAndBytesConfig.from_dict(values).to_dict() == values


def test_dtypes_are_taken_as_objects_and_as_names():
    one, other = (gemmakit.BitsAndBytesConfig(bnb_4bit_compute_dtype=d) for d in (torch.bfloat16, "bfloat16"))
    assert one == other


# -- the model -----------------------------------------------------------------------------------------------------


def test_projections_are_quantized_and_the_rest_is_not(model):
    assert model.is_quantized and model.is_loaded_in_4bit and not model.is_loaded_in_8bit
    assert model.quantization_config == NF4
    kinds = {n.rpartition(".")[2]: type(m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {n for n, kind in kinds.items() if kind is bnb.nn.Linear4bit} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_floating_point()


def test_a_dictionary_is_as_good(plain, model):
    other = gemmakit.AutoModelForCausalLM.from_pretrained(plain, quantization_config=NF4.to_dict())
    assert torch.equal(logits(other), logits(model))


def test_plain_models_are_not_quantized(plain):
    model = gemmakit.GemmaForCausalLM.from_pretrained(plain)
    assert not model.is_quantized
    assert model.quantization_config is None
    assert model.half().dtype == torch.float16
    assert model.to(torch.bfloat16).dtype == torch.bfloat16


def test_casts_are_refused_and_moves_are_not(model):
    for cast in (lambda: model.to(torch.bfloat16), lambda: model.to("cpu", torch.float16), model.half, model.float,
                 model.bfloat16, model.double):  # fmt: skip
        with pytest.raises(InputError, match="quantized model cannot be cast"):
            cast()
    before = logits(model)
    assert torch.equal(logits(model.to("cpu")), before)


def test_generation_hooks_copies_and_pickles_work(model):
    before, seen = logits(model), []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: seen.append(a[2].shape))
    out = model.generate(IDS, max_new_tokens=4, do_sample=False)
    handle.remove()
    assert out.shape[1] <= IDS.shape[1] + 4 and seen
    assert torch.equal(logits(copy.deepcopy(model)), before)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), before)


def test_evaluation_leaves_the_stored_bits_alone(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", [dict(load_in_4bit=True), dict(load_in_8bit=True)], ids=["4", "8"])
def test_adapters_alone_get_gradients(plain, bits):
    peft = pytest.importorskip("peft")
    model = gemmakit.GemmaForCausalLM.from_pretrained(plain, quantization_config=bits)
    logits(model)  # an evaluation before the training must not stop gradients
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.train()
    model(IDS, labels=IDS).loss.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert touched and all("lora_" in n for n in touched)
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_the_base_model_opens_and_saves_quantized_files(saved, model, tmp_path):
    base = gemmakit.GemmaModel.from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "base")), logits(model))


def test_biases_come_along(tmp_path):
    model = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**SHAPE, attention_bias=True))
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    model.save_pretrained(tmp_path)
    quantized = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path, quantization_config=NF4)
    assert torch.equal(quantized.model.layers[0].self_attn.q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)


def test_the_documents_example_runs_on_the_demo_model():
    demo = Path(gemmakit.__file__).parent / "demo"
    config = gemmakit.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type="nf4"
    )
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(demo)
    model = gemmakit.AutoModelForCausalLM.from_pretrained(
        demo, quantization_config=config, device_map="auto", attn_implementation="sdpa"
    )
    inputs = tokenizer("LLMs generate text through a process known as.", return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=20, do_sample=False, cache_implementation="static")
    dynamic = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(outputs, dynamic)
    assert tokenizer.decode(outputs[0], skip_special_tokens=True).startswith("LLMs generate text")


# -- files ---------------------------------------------------------------------------------------------------------


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def state(**values):
    def edit(tensors):
        key = f"{UP}.quant_state.bitsandbytes__nf4"
        new = {**json.loads(bytes(tensors[key].tolist())), **values}
        tensors[key] = torch.tensor(list(json.dumps(new).encode()), dtype=torch.uint8)

    return edit


def cut(part):
    return lambda tensors: tensors.update({part: tensors[part][:-1].clone()})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(UP), "lacks model.layers.0.mlp.up_proj.weight"),
        (lambda t: t.pop(f"{UP}.absmax"), "lacks its absmax"),
        (lambda t: t.pop(f"{UP}.nested_quant_map"), "lacks its nested_quant_map"),
        (lambda t: t.pop(f"{UP}.quant_state.bitsandbytes__nf4"), "has 0 of"),
        (lambda t: t.update({f"{UP}.surprise": torch.ones(2)}), "surprise"),
        (cut(UP), "needs 4096 bytes"),
        (cut(f"{UP}.absmax"), "needs 128 uint8 numbers of absmax"),
        (cut(f"{UP}.nested_absmax"), "nested_absmax"),
        (cut(f"{UP}.quant_map"), "quant_map"),
        (state(shape=[64, 128]), r"shape \(64, 128\)"),
        (state(blocksize=0), "makes no sense"),
        (state(dtype="__doc__"), "makes no sense"),
        (state(nested_offset="x"), "makes no sense"),
    ],
)
def test_damage_is_named(saved, edit, message):
    change(saved, edit)
    with pytest.raises(CheckpointError, match=message):
        gemmakit.GemmaForCausalLM.from_pretrained(saved)


def test_a_config_that_promises_quantized_weights_is_held_to_it(plain, saved):
    (saved / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no quantized weights"):
        gemmakit.GemmaForCausalLM.from_pretrained(saved)


def test_other_methods_are_refused_by_name(saved):
    values = json.loads((saved / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="gptq"):
        gemmakit.GemmaForCausalLM.from_pretrained(saved)


def test_the_call_decides_how_stored_bits_compute_but_not_how_many(saved):
    faster = gemmakit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    model = gemmakit.GemmaForCausalLM.from_pretrained(saved, quantization_config=faster)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert model.quantization_config.bnb_4bit_quant_type == "nf4"
    with pytest.raises(InputError, match="4-bit weights"):
        gemmakit.GemmaForCausalLM.from_pretrained(saved, quantization_config={"load_in_8bit": True})


def test_a_configuration_that_asks_for_nothing_is_refused(plain):
    with pytest.raises(InputError, match="load_in_4bit=True"):
        gemmakit.GemmaForCausalLM.from_pretrained(plain, quantization_config=gemmakit.BitsAndBytesConfig())


def test_the_missing_package_is_named_with_its_command(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependency, match=r"pip install 'gemmakit\[quantization\]'"):
        gemmakit.GemmaForCausalLM.from_pretrained(plain, quantization_config=NF4)


def test_what_the_package_cannot_do_is_said_before_loading(plain, monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("no kernel here")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", fail)
    with pytest.raises(InputError, match=r"cannot run nf4 layers on cpu.*no kernel here"):
        gemmakit.GemmaForCausalLM.from_pretrained(plain, quantization_config=NF4)
