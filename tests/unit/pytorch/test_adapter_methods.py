"""An adapter by the methods of the model: what `gemmakit.pytorch.adapters` does, and what peft's files say."""

import peft
import pytest
import torch
from tiny_gemma import prompts, tiny

from gemmakit.errors import InputError
from gemmakit.pytorch.adapters import LoraConfig, adapters_of, save_adapter

THEIRS = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
OURS = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))


def away(model):
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            for parameter in adapter.own().values():
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("config", [OURS, THEIRS], ids=["ours", "theirs"])
def test_an_adapter_is_added_by_either_librarys_settings(config):
    model = tiny()
    before = model(prompts()).logits
    model.add_adapter(config, adapter_name="default")
    assert torch.equal(model(prompts()).logits, before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained) and model._hf_peft_config_loaded
    away(model)
    assert not torch.allclose(model(prompts()).logits, before)


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_of_a_folder_is_loaded(trainable, tmp_path):
    model = tiny()
    model.add_adapter(OURS)
    save_adapter(away(model), OURS, tmp_path)
    again = tiny()
    again.load_adapter(tmp_path, is_trainable=trainable)
    assert torch.equal(again(prompts()).logits, model(prompts()).logits)
    assert any(p.requires_grad for n, p in again.named_parameters() if "lora" in n) is trainable


def test_what_cannot_be_honoured_is_refused_by_name(tmp_path):
    for given in ({"adapter_name": "other"}, {"hotswap": True}, {"no_such": 1}, {"adapter_state_dict": {}}):
        with pytest.raises(InputError, match=next(iter(given))):
            tiny().load_adapter(tmp_path, **given)
    with pytest.raises(InputError, match="adapter_config is a dict"):
        tiny().add_adapter({"r": 4})
    with pytest.raises(InputError, match="IA3"):
        tiny().add_adapter(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
