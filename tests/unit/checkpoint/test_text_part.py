"""Folders of text and images, as Gemma 3 from 4B on is released: the text is loaded, the rest is named and left out."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemmakit
from gemmakit.checkpoint.checkpoint import open_checkpoint
from gemmakit.checkpoint.inspect import inspect
from gemmakit.errors import CheckpointError, ConfigError

SIZES = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, sliding_window=4, query_pre_attn_scalar=16)  # fmt: skip
IMAGES = {"vision_tower.vision_model.post_layernorm.weight": torch.ones(5),
          "multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(7)}  # fmt: skip
# As checkpoints were released, and as transformers 5 names modules.
PREFIXES = {"released": ("language_model.model.", ""), "modules": ("model.language_model.", "model.")}


def text_model():
    torch.manual_seed(0)
    model = gemmakit.AutoModelForCausalLM.from_config(
        gemmakit.GemmaConfig.from_dict({"model_type": "gemma3_text", **SIZES})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model.eval()


def write(model, folder, names="released", text=True, **config):
    folder.mkdir(parents=True, exist_ok=True)
    inner, outer = PREFIXES[names]
    tensors = {outer + name: tensor for name, tensor in IMAGES.items()}
    if text:
        own = {n.removeprefix("model."): t for n, t in model.state_dict().items() if not n.startswith("lm_head")}
        tensors |= {inner + name: tensor for name, tensor in own.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {},
              "text_config": json.loads(model.config.to_json_string()), "eos_token_id": [1, 106], **config}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("names", PREFIXES)
def test_the_text_is_loaded_and_saved_as_a_model_of_text(tmp_path, names):
    model = text_model()
    loaded = gemmakit.AutoModelForCausalLM.from_pretrained(write(model, tmp_path / "in", names))
    assert type(loaded).__name__ == "Gemma3ForCausalLM"
    assert loaded.config.eos_token_ids == (1, 106)
    ids = torch.tensor([[2, 5, 9, 7, 3, 8]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as held:
        assert "model.embed_tokens.weight" in held
        assert not held.left_out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_unified"])
def test_gemma_4s_text_is_loaded_from_beside_images_and_sound(tmp_path, kind):
    """In an encoder-free folder the text goes by another name, and says nothing of embeddings a layer."""
    sizes = {name: value for name, value in SIZES.items() if name != "query_pre_attn_scalar"}
    more = dict(hidden_size_per_layer_input=6 if kind == "gemma4" else 0, vocab_size_per_layer_input=128)
    model = gemmakit.Gemma4ForCausalLM(gemmakit.Gemma4TextConfig(**sizes, **more, global_head_dim=24)).eval()
    text = json.loads(model.config.to_json_string())
    if kind == "gemma4_unified":
        text = {k: v for k, v in text.items() if not k.endswith("per_layer_input")} | {"model_type": f"{kind}_text"}
    write(model, tmp_path, "modules", model_type=kind, text_config=text, audio_config={})
    tensors = load_file(tmp_path / "model.safetensors")
    others = {f"model.{part}.weight": torch.ones(3) for part in ("embed_vision", "audio_tower", "embed_audio")}
    save_file({**tensors, **others}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is gemmakit.Gemma4ForCausalLM
    ids = torch.tensor([[2, 5, 9, 7, 3, 8]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("names", PREFIXES)
def test_converting_quantizing_and_inspecting_leave_the_images_out_and_say_so(tmp_path, names):
    model = text_model()
    folder = write(model, tmp_path / "in", names)
    gemmakit.convert_checkpoint(folder, tmp_path / "plain")
    gemmakit.quantize_checkpoint(folder, tmp_path / "int8", "int8")
    ids = torch.tensor([[2, 5, 9, 7, 3, 8]])
    load = gemmakit.AutoModelForCausalLM.from_pretrained
    assert torch.equal(load(tmp_path / "plain")(ids).logits, model(ids).logits)
    direct = load(folder, quantization_config="int8")
    assert torch.equal(load(tmp_path / "int8")(ids).logits, direct(ids).logits)
    found = inspect(folder, deep=True)
    assert not found.problems
    assert "2 tensors that only images need are left out" in found.notes


def test_a_folder_of_images_alone_is_refused_by_name(tmp_path):
    folder = write(text_model(), tmp_path, text=False)
    with pytest.raises(CheckpointError, match=r"only what a model sees images with.*'(vision_tower|multi_modal)"):
        gemmakit.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="only what a model sees images with"):
        gemmakit.convert_checkpoint(folder, tmp_path / "out")


def test_a_folder_without_a_text_config_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=re.escape("text_config")):
        gemmakit.AutoModelForCausalLM.from_pretrained(write(text_model(), tmp_path, text_config=None))


@pytest.mark.parametrize("model_type", ["gemma3n", "gemma3n_text", "paligemma", "t5gemma", "siglip_vision_model"])
def test_other_models_are_refused_by_name_with_what_runs(tmp_path, model_type):
    folder = write(text_model(), tmp_path, model_type=model_type)
    with pytest.raises(ConfigError, match=f"'{model_type}'.*gemmakit runs.*Gemma 3"):
        gemmakit.AutoModelForCausalLM.from_pretrained(folder)
    assert any(model_type in problem.line() for problem in inspect(folder).problems)
