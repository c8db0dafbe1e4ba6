"""Files of later members in both libraries: bitsandbytes, and the text of a model of text and images."""

from __future__ import annotations

import pytest
import torch
import transformers
from parity_tools import LIBRARIES, apart, batch, randomise
from tiny_shapes import COMMON, MEMBERS, SHAPES, WINDOW

import gemmakit
from gemmakit.family import KINDS

SCHEMES = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": dict(load_in_8bit=True),
}
# Of 4 bits the products are the same and the rest differs by float32's order of sums; 8 bits round inputs to float16.
LIMITS = {"nf4": 4e-5, "int8": 1e-2}


def loaded(library, member, folder, settings=None):
    bnb = pytest.importorskip("bitsandbytes")
    how = {} if settings is None else {"quantization_config": library.BitsAndBytesConfig(**settings)}
    kind = getattr(library, KINDS[member].classes["causal_lm"])
    model = kind.from_pretrained(folder, attn_implementation="eager", **how).eval()
    for module in model.modules():  # theirs would repack itself on some processors, and compute in bfloat16
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("member", MEMBERS)
def test_bitsandbytes_gives_transformers_bits_and_files_go_both_ways(checkpoint, member, scheme, tmp_path):
    ids, _ = batch("none", width=3 * WINDOW)
    folder = checkpoint("gqa", member=member)
    models = {name: loaded(library, member, folder, SCHEMES[scheme]) for name, library in LIBRARIES.items()}
    states = {name: model.state_dict() for name, model in models.items()}
    assert states["gemmakit"].keys() == states["transformers"].keys()
    for name, tensor in states["transformers"].items():
        assert torch.equal(states["gemmakit"][name], tensor), name
    assert apart(logits(models["gemmakit"], ids), logits(models["transformers"], ids)) < LIMITS[scheme]
    for name, other in (("gemmakit", transformers), ("transformers", gemmakit)):
        models[name].save_pretrained(tmp_path / name)
        opened = loaded(other, member, tmp_path / name)
        wanted = models["transformers" if other is transformers else "gemmakit"]
        assert torch.equal(logits(opened, ids), logits(wanted, ids)), name


def test_the_text_of_transformers_model_of_text_and_images_is_loaded_and_goes_back(tmp_path):
    text = {**COMMON, **SHAPES["gqa"], **MEMBERS["gemma3_text"]}
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.set_attn_implementation("eager")
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "a")
    ours = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager")
    assert type(ours).__name__ == "Gemma3ForCausalLM"
    ids, _ = batch("none", width=5 * WINDOW)
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    ours.save_pretrained(tmp_path / "b")
    again = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "b", attn_implementation="eager").eval()
    assert torch.equal(logits(again, ids), logits(theirs, ids))
    tokens = ours.generate(ids[:1], max_new_tokens=2 * WINDOW, eos_token_id=None)
    assert torch.equal(tokens, again.generate(ids[:1], max_new_tokens=2 * WINDOW, eos_token_id=None, do_sample=False))
