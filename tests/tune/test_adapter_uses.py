"""An adapter is taken by pipelines and the server, in GGUF too; each gives what the adapted model gives."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gemmakit
from gemmakit.errors import InputError
from gemmakit.gguf import read_gguf_header
from gemmakit.pytorch.adapters import (
    LoraConfig,
    adapter_to_gguf,
    adapters_of,
    add_adapter,
    base_of,
    load_adapter,
    save_adapter,
)


@pytest.fixture
def adapted(tiny, tmp_path):
    """(settings) -> a folder with an adapter that is not where it began, and the model that has it."""

    def make(**settings):
        model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})
        add_adapter(model, config)
        with torch.no_grad():
            for adapter in adapters_of(model).values():
                for parameter in adapter.own().values():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        save_adapter(model, config, tmp_path / "adapter", base=tiny)
        return tmp_path / "adapter", model

    return make


def test_a_pipeline_folds_an_adapter_in_and_runs_it_beside_codes(tiny, adapted):
    folder, model = adapted()
    ids = torch.randint(4, 900, (1, 9))
    folded = gemmakit.pipeline("text-generation", str(tiny), adapter=folder, device="cpu").model
    assert not adapters_of(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    beside = gemmakit.pipeline(
        "text-generation", str(tiny), adapter=folder, device="cpu", model_kwargs={"quantization_config": "int8"}
    ).model
    assert adapters_of(beside)
    plain = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():  # 8 bits cost less than the adapter changes
        off, changed = (beside(ids).logits - model(ids).logits).abs(), (plain(ids).logits - model(ids).logits).abs()
    assert float(off.mean()) < 0.2 * float(changed.mean())


def test_the_server_answers_with_an_adapter(tiny, adapted):
    pytest.importorskip("fastapi", reason="the server needs gemmakit[serve]")
    from gemmakit.serve.service import Loading, Service

    folder, model = adapted()
    service = Service()
    service.load(Loading(str(tiny), ("tiny",), {"adapter": folder, "device": "cpu"}, None, {}))
    ids = torch.randint(4, 900, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(service.model.pipe.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"alpha_pattern": (("q_proj", 3.0),)}])
def test_a_gguf_adapter_holds_the_same_update(tiny, adapted, tmp_path, changes):
    """alpha / rank times B A of the file is the update of the module, as llama.cpp computes it."""
    gguf = pytest.importorskip("gguf")
    folder, model = adapted(**changes)
    path = adapter_to_gguf(folder, tmp_path / "adapter.gguf", model.config)
    found = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in found.tensors}
    assert len(tensors) == 2 * 7 * 2
    alpha = float(found.fields["adapter.lora.alpha"].parts[-1][0])
    for ours, theirs in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
        a, b = (np.array(tensors[f"blk.1.{theirs}.weight.lora_{part}"]) for part in "ab")
        expected = model.get_submodule(f"model.layers.1.{ours}").update().detach().numpy()
        np.testing.assert_allclose(b @ a * alpha / len(a), expected, rtol=1e-5, atol=1e-7)
    keys = read_gguf_header(path).metadata
    assert (keys["general.architecture"], keys["general.type"], keys["adapter.type"]) == ("gemma", "adapter", "lora")


def test_what_gguf_adapters_cannot_say_is_refused(adapted, tmp_path):
    folder, model = adapted(use_dora=True)
    with pytest.raises(InputError, match=r"DoRA.*merge"):
        adapter_to_gguf(folder, tmp_path / "a.gguf", model.config)
    folder, model = adapted(target_modules=("embed_tokens",))
    with pytest.raises(InputError, match=r"embed_tokens.*merge"):
        adapter_to_gguf(folder, tmp_path / "a.gguf", model.config)
    assert not (tmp_path / "a.gguf").exists()


def test_a_gguf_adapter_is_refused_for_another_model(adapted, tmp_path):
    folder, model = adapted(target_modules=("q_proj", "down_proj"))
    wider = dataclasses.replace(model.config, intermediate_size=2 * model.config.intermediate_size)
    with pytest.raises(InputError, match=r"not this model's: .*down_proj\.lora_A"):
        adapter_to_gguf(folder, tmp_path / "a.gguf", wider)
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    save_file({key: tensor for key, tensor in stored.items() if "lora_B" not in key}, path)
    with pytest.raises(InputError, match="lora_A alone"):
        adapter_to_gguf(folder, tmp_path / "a.gguf", model.config)
    assert not (tmp_path / "a.gguf").exists()


def test_a_model_that_its_caller_loaded_is_not_folded_into(tiny, adapted):
    folder, _ = adapted()
    model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
    with pytest.raises(InputError, match=r"adapter are for loading.*load_adapter"):
        gemmakit.pipeline("text-generation", model, adapter=folder)
    assert not adapters_of(model)


def test_an_adapter_says_what_it_is_for(tiny, adapted, tmp_path):
    folder, _ = adapted()
    assert base_of(folder) == str(tiny)
    assert base_of(tmp_path) is None


def test_a_flax_pipeline_refuses_an_adapter_with_the_remedy(adapted):
    pytest.importorskip("flax", reason="Flax needs gemmakit[flax]")
    folder, _ = adapted()
    with pytest.raises(InputError, match="gemmakit merge"):
        gemmakit.pipeline("text-generation", framework="flax", adapter=folder)


def test_loading_leaves_nothing_to_train(tiny, adapted):
    folder, _ = adapted()
    model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
    load_adapter(model, folder)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
