"""Quantized by bitsandbytes: the same bits and the same logits as transformers, and files that go both ways."""

import json

import pytest
import torch
import transformers
from parity_tools import randomise

import gemmakit

bnb = pytest.importorskip("bitsandbytes")

SHAPE = dict(vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=96)  # fmt: skip
# Rows and columns that neither blocks of 64 nor bytes of two values divide.
ODD = {**SHAPE, "hidden_size": 33, "intermediate_size": 51, "head_dim": 6}
IDS = torch.randint(4, 160, (3, 11), generator=torch.Generator().manual_seed(1))
FOUR = [
    dict(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=compute)
    for kind in ("nf4", "fp4")
    for double in (False, True)
    for compute in (torch.float32, torch.bfloat16)
]
NAMES = [f"{s['bnb_4bit_quant_type']}-{s['bnb_4bit_use_double_quant']}-{s['bnb_4bit_compute_dtype']}" for s in FOUR]
EIGHT = dict(load_in_8bit=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """shape -> a folder with random float32 weights."""
    made = {}

    def make(shape=SHAPE):
        key = repr(shape)
        if key not in made:
            model = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**shape))
            randomise(model)
            made[key] = tmp_path_factory.mktemp("plain")
            model.save_pretrained(made[key])
        return made[key]

    return make


def load(library, folder, settings=None, **more):
    config = {} if settings is None else {"quantization_config": library.BitsAndBytesConfig(**settings)}
    model = library.GemmaForCausalLM.from_pretrained(folder, attn_implementation="eager", **config, **more).eval()
    for module in model.modules():
        # Theirs would repack itself on some processors, and then compute in bfloat16 whatever was asked for.
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def assert_same_weights(ours, theirs):
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


def assert_same_logits(ours, theirs):
    a, b = logits(ours), logits(theirs)
    # The same quantized products; norms and attention round apart in float32 alone.
    limit = 2e-5 if ours.dtype == torch.float32 else 0.03
    assert float((a - b).abs().max() / b.abs().max()) < limit


@pytest.mark.parametrize("settings", FOUR, ids=NAMES)
def test_4_bits_equal_transformers(settings, plain):
    ours, theirs = load(gemmakit, plain(), settings), load(transformers, plain(), settings)
    assert_same_weights(ours, theirs)
    layer = ours.model.layers[0].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.compute_dtype == settings["bnb_4bit_compute_dtype"]
    pairs = [(m.model.layers[1].self_attn.o_proj.weight) for m in (ours, theirs)]
    assert torch.equal(*(bnb.functional.dequantize_4bit(w.data, w.quant_state) for w in pairs))
    if settings["bnb_4bit_compute_dtype"] == torch.float32:
        assert_same_logits(ours, theirs)
    else:  # inputs that differ in their last float32 bit now and then round to the other bfloat16
        a, b = logits(ours), logits(theirs)
        assert float((a - b).norm() / b.norm()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_are_quantized_from_their_dtype(dtype, plain):
    settings = FOUR[0]
    ours = load(gemmakit, plain(), settings, dtype=dtype)
    theirs = load(transformers, plain(), settings, dtype=dtype)
    assert ours.dtype == dtype
    assert_same_weights(ours, theirs)
    assert ours.model.layers[0].mlp.up_proj.weight.quant_state.dtype == dtype


def test_8_bits_equal_transformers(plain):
    ours, theirs = load(gemmakit, plain(), EIGHT), load(transformers, plain(), EIGHT)
    assert_same_weights(ours, theirs)
    a, b = logits(ours), logits(theirs)
    assert float((a - b).norm() / b.norm()) < 5e-3  # inputs are rounded to float16, and then to whole steps
    assert ours.is_loaded_in_8bit


@pytest.mark.parametrize("settings", [FOUR[0], FOUR[2]], ids=["single", "double"])
def test_odd_sizes_equal_transformers(settings, plain):
    ours, theirs = load(gemmakit, plain(ODD), settings), load(transformers, plain(ODD), settings)
    assert_same_weights(ours, theirs)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("settings", [*FOUR, EIGHT], ids=[*NAMES, "int8"])
def test_we_load_what_transformers_saved(settings, shape, plain, tmp_path):
    theirs = load(transformers, plain(shape), settings)
    theirs.save_pretrained(tmp_path)
    ours, fresh = load(gemmakit, tmp_path), load(gemmakit, plain(shape), settings)
    assert ours.is_quantized
    assert_same_weights(ours, theirs)
    assert torch.equal(logits(ours), logits(fresh))


@pytest.mark.parametrize("settings", [*FOUR, EIGHT], ids=[*NAMES, "int8"])
def test_transformers_loads_what_we_saved(settings, plain, tmp_path):
    ours = load(gemmakit, plain(), settings)
    before = logits(ours)
    ours.save_pretrained(tmp_path)
    theirs, direct = load(transformers, tmp_path), load(transformers, plain(), settings)
    assert_same_weights(ours, theirs)
    assert torch.equal(logits(theirs), logits(direct))
    assert torch.equal(logits(load(gemmakit, tmp_path)), before)


def test_skipped_modules_stay_plain_in_both_libraries(plain, tmp_path):
    settings = dict(load_in_4bit=True, llm_int8_skip_modules=["q_proj", "model.layers.1", "lm_head"])
    ours, theirs = load(gemmakit, plain(), settings), load(transformers, plain(), settings)
    kinds = [{n: type(m) is bnb.nn.Linear4bit for n, m in x.named_modules() if "proj" in n} for x in (ours, theirs)]
    assert kinds[0] == kinds[1]
    assert {n for n, packed in kinds[0].items() if packed} == {
        f"model.layers.0.{n}"
        for n in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
                  "mlp.down_proj")
    }  # fmt: skip
    ours.save_pretrained(tmp_path)
    assert_same_weights(load(gemmakit, tmp_path), load(transformers, tmp_path))


def test_the_head_stays_plain_for_transformers_too(plain, tmp_path):
    load(gemmakit, plain(), dict(load_in_4bit=True, llm_int8_skip_modules=["q_proj"])).save_pretrained(tmp_path)
    assert (
        "lm_head" in json.loads((tmp_path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    )
    assert type(load(transformers, tmp_path).lm_head) is torch.nn.Linear


def test_the_dictionaries_are_equal():
    for settings in (*FOUR, EIGHT, dict(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16")):
        theirs = json.loads(json.dumps(transformers.BitsAndBytesConfig(**settings).to_dict()))
        ours = gemmakit.BitsAndBytesConfig(**settings)
        assert ours.to_dict() == theirs
        assert gemmakit.BitsAndBytesConfig.from_dict(theirs) == ours
