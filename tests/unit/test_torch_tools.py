"""The tools people use with torch models: torch.compile, torch.export, accelerate and PEFT."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gemmakit import GemmaConfig, GemmaForCausalLM, StaticCache
from gemmakit.errors import InputError, MissingDependency
from gemmakit.pytorch.export import DecodeStep
from gemmakit.pytorch.heads import GemmaForSequenceClassification, GemmaForTokenClassification

CLOSE = dict(atol=1e-5, rtol=1e-4)  # float32 sums in another order


def tiny(cls=GemmaForCausalLM, **more):
    torch.manual_seed(0)
    settings = dict(vocab_size=40, hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
    return cls(GemmaConfig(**{**settings, **more})).eval()


def some(length, rows=2):
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(length))


# -- torch.compile ------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """A backend that counts what it is given to compile, and runs it as it is."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    yield seen, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_one_graph_without_breaks_serves_every_length(name, padded, graphs):
    seen, backend = graphs
    model = tiny(attn_implementation=name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 9, 17, 30):
        mask = None
        if padded:
            mask = torch.ones(2, length, dtype=torch.long)
            mask[0, :3] = 0
        got = compiled(some(length), attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(got, model(some(length), attention_mask=mask).logits, **CLOSE)
    assert len(seen) == 1


@torch.no_grad()
def test_one_graph_serves_every_step_of_a_static_cache(graphs):
    seen, backend = graphs
    model, ids = tiny(), some(12)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    cache = StaticCache(model.config, 2, 16, dtype=torch.float32)
    model(ids[:, :4], past_key_values=cache, cache_position=torch.arange(4))
    for i in range(4, 12):
        got = compiled(ids[:, i : i + 1], past_key_values=cache, cache_position=torch.tensor([i])).logits
        torch.testing.assert_close(got[:, 0], model(ids[:, : i + 1]).logits[:, -1], **CLOSE)
    assert len(seen) == 1


def test_a_compiled_model_trains_in_one_graph(graphs):
    seen, backend = graphs
    model = tiny().train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (6, 11):
        model.zero_grad()
        compiled(some(length), labels=some(length), use_cache=False).loss.backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(some(length), labels=some(length)).loss.backward()
        for a, p in zip(got, model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, **CLOSE)
    assert len(seen) == 1


@pytest.mark.parametrize("cls", [GemmaForSequenceClassification, GemmaForTokenClassification])
@torch.no_grad()
def test_the_classification_heads_compile_without_breaks(cls, graphs):
    seen, backend = graphs
    model = tiny(cls, num_labels=3)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 9):
        ids = some(length)
        labels = torch.zeros((2,) if cls is GemmaForSequenceClassification else ids.shape, dtype=torch.long)
        got, expected = compiled(ids, labels=labels, use_cache=False), model(ids, labels=labels)
        torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
        torch.testing.assert_close(got.loss, expected.loss, **CLOSE)
    assert len(seen) == 1


# -- torch.export -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_exported_step_decodes_like_the_model(tmp_path):
    model, ids = tiny(), some(8, rows=1)
    step = DecodeStep(model, 1, 16)
    program = torch.export.export(step, (ids[:, :1], torch.tensor([0])))
    torch.export.save(program, tmp_path / "step.pt2")
    run = torch.export.load(tmp_path / "step.pt2").module()
    for i in range(8):
        got = run(ids[:, i : i + 1], torch.tensor([i]))
        torch.testing.assert_close(got[:, 0], model(ids[:, : i + 1]).logits[:, -1], **CLOSE)


@torch.no_grad()
def test_a_step_forgets_when_told():
    model, ids = tiny(), some(3)
    step = DecodeStep(model, 2, 16)
    for _ in range(2):
        torch.testing.assert_close(step(ids, torch.arange(3)), model(ids).logits, **CLOSE)
        step.reset()
    assert not step.keys_0.any()
    assert {n for n, _ in step.named_buffers(recurse=False)} == {
        f"{x}_{i}" for x in ("keys", "values") for i in range(3)
    }


# -- device_map ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.mark.parametrize("device_map", ["cpu", "auto", -1, {"": "cpu"}, torch.device("cpu")])
@torch.no_grad()
def test_one_device_is_named_in_many_ways(saved, device_map):
    folder, model = saved
    loaded = GemmaForCausalLM.from_pretrained(folder, device_map=device_map)
    assert loaded.device.type == "cpu" or torch.cuda.is_available()
    torch.testing.assert_close(loaded(some(5).to(loaded.device)).logits.cpu(), model(some(5)).logits, **CLOSE)


@torch.no_grad()
def test_modules_on_disk_take_part(saved, tmp_path):
    folder, model = saved
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}  # fmt: skip
    loaded = GemmaForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off")
    assert loaded.model.layers[1].mlp.up_proj.weight.is_meta and loaded.device.type == "cpu"
    assert list((tmp_path / "off").glob("*.dat"))
    torch.testing.assert_close(loaded(some(7)).logits, model(some(7)).logits, **CLOSE)
    got = loaded.generate(some(4, rows=1), max_new_tokens=5, do_sample=False)
    assert torch.equal(got, model.generate(some(4, rows=1), max_new_tokens=5, do_sample=False))
    with pytest.raises(InputError, match="offloaded"):
        loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(InputError, match="offloaded"):
        loaded.prune_heads({1: [0, 1]})


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
@torch.no_grad()
def test_a_memory_limit_shares_layers_out(saved, tmp_path, device_map):
    folder, model = saved
    loaded = GemmaForCausalLM.from_pretrained(
        folder, device_map=device_map, max_memory={"cpu": 26_000}, offload_folder=tmp_path / "off"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(".layers.1." in name for name in loaded.hf_device_map), "a layer is whole on one device"
    torch.testing.assert_close(loaded(some(7)).logits, model(some(7)).logits, **CLOSE)


def test_device_maps_that_cannot_be_are_refused(saved, monkeypatch):
    folder, _ = saved
    with pytest.raises(InputError, match="device_map is 'gpu-please'"):
        GemmaForCausalLM.from_pretrained(folder, device_map="gpu-please")
    absent = torch.accelerator.device_count()
    with pytest.raises(InputError, match=f"max_memory names device {absent}, and torch sees {absent}"):
        GemmaForCausalLM.from_pretrained(folder, device_map="auto", max_memory={absent: "1GB"})
    if absent == 0:
        with pytest.raises(InputError, match="device 0 asks for an accelerator"):
            GemmaForCausalLM.from_pretrained(folder, device_map=0)
    with pytest.raises(InputError, match="does not place every weight"):
        GemmaForCausalLM.from_pretrained(folder, device_map={"model.norm": "cpu", "lm_head": "disk"})
    places = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(InputError, match="offload_folder="):
        GemmaForCausalLM.from_pretrained(folder, device_map=places)
    monkeypatch.setattr("gemmakit.pytorch.placement._installed", lambda: False)
    with pytest.raises(MissingDependency, match="pip install 'accelerate"):
        GemmaForCausalLM.from_pretrained(folder, device_map=places)
    assert GemmaForCausalLM.from_pretrained(folder, device_map="auto").device.type in ("cpu", "cuda", "mps")


# -- PEFT ---------------------------------------------------------------------------------------------------------


def lora(model, **more):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **more))


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_lora_trains_its_adapters_alone(task):
    base = tiny()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = lora(base, target_modules=["q_proj", "v_proj", "down_proj"], task_type=task)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    ids = some(9)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    model.train()
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9
    frozen = {n.replace(".base_layer", ""): p for n, p in base.named_parameters() if "lora_" not in n}
    assert all(torch.equal(frozen[n], p) for n, p in before.items())


def test_lora_finds_gemmas_modules_by_itself_and_generates_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny()
    model = lora(base, task_type="CAUSAL_LM", init_lora_weights=False).eval()  # random adapters: they show at once
    assert isinstance(base.model.layers[0].self_attn.q_proj, peft.tuners.lora.LoraLayer)
    ids = some(5, rows=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert not torch.allclose(logits, tiny()(ids).logits, atol=1e-3)
        tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, logits)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-3)
        assert torch.equal(merged.generate(ids, max_new_tokens=6, do_sample=False), tokens)
    merged.save_pretrained(tmp_path / "merged")
    assert type(GemmaForCausalLM.from_pretrained(tmp_path / "merged")) is GemmaForCausalLM


def test_lora_with_gradient_checkpointing_reaches_every_adapter():
    base = tiny()
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model = lora(base, task_type="CAUSAL_LM").train()
    model(input_ids=some(6), labels=some(6)).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert len(grads) == 6 and all(g is not None and g.abs().max() > 0 for g in grads.values())


def test_lora_on_a_classifier_trains_its_head_too():
    model = lora(tiny(GemmaForSequenceClassification, num_labels=3), task_type="SEQ_CLS")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("score" in n for n in trained)
    out = model(input_ids=some(6), labels=torch.tensor([0, 2]))
    out.loss.backward()
    assert out.logits.shape == (2, 3)


def test_pruning_through_an_adapter_is_refused():
    base = tiny()
    lora(base, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match=r"q_proj of layer 0 is a Linear.*adapters"):
        base.prune_heads({0: [0, 1]})


def test_importing_the_package_needs_none_of_these_tools():
    tools = ("peft", "accelerate", "flash_attn")
    code = f"import sys, gemmakit.pytorch.heads; print([m for m in {tools} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
