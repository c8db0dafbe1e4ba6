"""Our adapters are PEFT's: the same numbers and gradients, files that either reads, merged and not; others refused."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmakit.errors import CheckpointError, InputError, UnsafeFile
from gemmakit.pytorch.adapters import LoraConfig, adapters_of, add_adapter, load_adapter, merge_adapter, save_adapter
from gemmakit.pytorch.adapters.modules import AdaptedLinear

sys.path.append(str(Path(__file__).parents[1] / "unit" / "pytorch"))
from tiny_gemma import far, prompts, tiny

# float32, the same products in another order.
CLOSE = 1e-5
KINDS = {
    "lora": dict(r=4, lora_alpha=8),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True),
    "dora": dict(r=4, lora_alpha=8, use_dora=True),
    "patterns": dict(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3}),
    "embedding": dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj", "down_proj"]),
    "head": dict(r=4, target_modules=["lm_head", "v_proj"]),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(kind="lora", **changes):
    """Tied, but where the head alone is adapted: peft has no file for that."""
    return tiny(**{"tie_word_embeddings": kind != "head", **changes})


@pytest.fixture
def theirs(request, tmp_path):
    """An adapter that peft made and saved, with weights away from where they begin."""
    kind = request.param
    settings = {"target_modules": TARGETS, **KINDS[kind]}
    model = peft.get_peft_model(base(kind), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "theirs")
    return kind, model.eval(), tmp_path / "theirs"


def every(*names):
    return pytest.mark.parametrize("theirs", names or list(KINDS), indirect=True)


@every()
def test_an_adapter_of_peft_gives_the_same_numbers_here(theirs):
    kind, model, folder = theirs
    ours = base(kind)
    load_adapter(ours, folder)
    ids = prompts()
    with torch.no_grad():
        expected = model(ids).logits
        assert far(ours(ids).logits, expected) < CLOSE
        assert far(base(kind)(ids).logits, expected) > 0.01  # it changes something


@every()
def test_peft_gives_the_same_numbers_with_an_adapter_saved_here(theirs, tmp_path):
    kind, model, folder = theirs
    ours = base(kind)
    config = load_adapter(ours, folder)
    save_adapter(ours, config, tmp_path / "ours", base="somewhere")
    again = peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours")
    with torch.no_grad():
        assert far(again(prompts()).logits, model(prompts()).logits) < CLOSE
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    expected = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == {key for key in expected if "lora_" in key}  # peft adds whole embeddings
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"


@every()
def test_gradients_are_those_of_peft(theirs):
    kind, model, folder = theirs
    ours = base(kind)
    load_adapter(ours, folder)
    for adapter in adapters_of(ours).values():
        for parameter in adapter.own().values():
            parameter.requires_grad_(True)
    ids = prompts()
    for each in (ours, model):
        each(input_ids=ids, labels=ids).loss.backward()
    mine = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    expected = {
        n.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p.grad
        for n, p in model.named_parameters()
        if p.grad is not None and "lora_" in n
    }
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        assert far(mine[name], gradient) < 1e-4, name


@every()
def test_merging_changes_no_number_and_no_other_weight(theirs):
    kind, _, folder = theirs
    ours, plain = base(kind), base(kind)
    load_adapter(ours, folder)
    with torch.no_grad():
        expected = ours(prompts()).logits
        merge_adapter(ours)
        assert far(ours(prompts()).logits, expected) < CLOSE
    assert not adapters_of(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    if kind == "embedding":  # the head keeps the weight that the embedding had
        assert not ours.config.tie_word_embeddings
        assert torch.equal(ours.lm_head.weight, plain.lm_head.weight)
    untouched = [name for name in plain.state_dict() if "norm" in name]
    assert untouched and all(torch.equal(ours.state_dict()[n], plain.state_dict()[n]) for n in untouched)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_on_quantized_weights_are_those_on_the_dequantized(quantization, dora, tmp_path):
    """QLoRA: the same products, by the kernel's panels in one and torch's in the other."""
    import gemmakit

    tiny(hidden_size=64, intermediate_size=96, num_attention_heads=2, head_dim=32).save_pretrained(tmp_path)
    found = []
    quantized = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path, dtype="float32", quantization_config=quantization)
    plain = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path, dtype="float32")
    for name, module in quantized.named_modules():
        if hasattr(module, "dequantized"):
            plain.get_submodule(name).weight = torch.nn.Parameter(module.dequantized())
    for model in (quantized, plain):
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(r=4, use_dora=dora))
        for adapter in adapters_of(model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.1)
        model(input_ids=prompts(), labels=prompts()).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours, expected = found
    assert ours.keys() == expected.keys() and len(ours) >= 2 * 7 * 2
    for name, gradient in expected.items():
        assert far(ours[name], gradient) < 2e-3, name  # codes meet activations rounded to 16 bits in blocks


def test_a_fresh_adapter_changes_nothing_and_trains_alone():
    model = tiny()
    before = model(prompts()).logits
    names = add_adapter(model, LoraConfig(r=4))
    assert len(names) == 7 * 2
    assert torch.equal(model(prompts()).logits, before)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    with pytest.raises(InputError, match="already"):
        add_adapter(model, LoraConfig(r=4))


def saved(folder, **changes):
    model = tiny()
    config = LoraConfig(r=4)
    add_adapter(model, config)
    save_adapter(model, config, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    return folder


@pytest.mark.parametrize(("changes", "said"), [
    ({"peft_type": "IA3"}, "IA3"),
    ({"bias": "all"}, "bias='all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"r": 2}, "another rank"),
    ({"r": 0}, "r is 0"),
    ({"target_modules": ["nothing"]}, "no module is called"),
    ({"target_modules": ["q_proj"]}, "no place for"),
])  # fmt: skip
def test_an_adapter_that_would_give_other_numbers_is_refused_by_name(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        load_adapter(tiny(), saved(tmp_path, **changes))


@pytest.mark.parametrize("changes", [
    {"target_modules": ["q_proj", "mlp"]},  # a module that is no projection, after one that is
    {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    {"target_modules": ["q_proj"]},  # the file holds more
])  # fmt: skip
def test_a_model_that_refuses_an_adapter_is_as_it_was(tmp_path, changes):
    model = tiny().requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    before = [(name, type(module)) for name, module in model.named_modules()]
    learnt = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(InputError):
        load_adapter(model, saved(tmp_path, **changes))
    if len(changes["target_modules"]) > 1:
        with pytest.raises(InputError):
            add_adapter(model, LoraConfig(**changes))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learnt


def test_an_adapter_of_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not this model's.*another model"):
        load_adapter(tiny(hidden_size=48), saved(tmp_path))
    with pytest.raises(InputError, match=r"no place for|lacks"):
        load_adapter(tiny(num_hidden_layers=1), saved(tmp_path))


def test_an_embedding_that_comes_with_an_adapter_must_be_the_models(tmp_path):
    path = saved(tmp_path, target_modules=["embed_tokens"], r=4) / "adapter_model.safetensors"
    key, own = "base_model.model.model.embed_tokens", tiny().get_input_embeddings().weight
    parts = {
        f"{key}.lora_embedding_A": torch.zeros(4, len(own)),
        f"{key}.lora_embedding_B": torch.zeros(own.shape[1], 4),
    }
    save_file({**parts, f"{key}.base_layer.weight": own.clone()}, path)
    load_adapter(tiny(), tmp_path)
    save_file({**parts, f"{key}.base_layer.weight": own + 1}, path)
    with pytest.raises(InputError, match="not this model's"):
        load_adapter(tiny(), tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsafeFile, match="can run code"):
        load_adapter(tiny(), tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_adapter(tiny(), tmp_path / "nowhere")


def test_a_model_with_an_adapter_is_not_saved_as_one_without(tmp_path):
    model = tiny()
    add_adapter(model, LoraConfig(r=2))
    with pytest.raises(InputError, match=r"save_adapter.*merge_adapter"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_rank_that_the_matrices_have_not_is_refused_before_memory_is_taken_for_it(tmp_path):
    saved(tmp_path, r=10**13)
    with pytest.raises(InputError, match="says rank 10000000000000"):
        load_adapter(tiny(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "["},
        {"target_modules": 5},
        {"target_modules": "(?<=a+)q_proj"},
        {"rank_pattern": {"(": 2}},
        pytest.param(
            {"rank_pattern": {"(?i)q_proj": 4}},
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="flags anywhere are read before Python 3.11"),
        ),
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": ["q_proj"]},
    ],
)
def test_settings_of_a_file_that_mean_nothing_are_refused(tmp_path, changes):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=r"regular expression|rank_pattern|target_modules"):
        load_adapter(tiny(), tmp_path)


@pytest.mark.parametrize(
    "expression",
    ["(a+)+b", "(a|a)*b", r"(\w+)*$", "a?" * 30 + "b", ".*" * 9 + "b", "(a{0,30}){0,30}b", "(?:x.*)+y", "a" * 5000],
)
def test_an_expression_that_names_could_keep_busy_for_ever_is_refused(tmp_path, expression):
    for changes in ({"target_modules": expression}, {"rank_pattern": {expression: 2}}):
        with pytest.raises(InputError, match="may take for ever"):
            load_adapter(tiny(), saved(tmp_path, **changes))


def test_expressions_that_adapters_are_published_with_are_read():
    """peft's own documentation, and what unsloth writes to keep to the language part."""
    found = LoraConfig(target_modules=r".*\.(q_proj|v_proj)$")
    assert found.targets("model.layers.0.self_attn.q_proj") and not found.targets("model.layers.0.self_attn.k_proj")
    names = "(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    parts = "(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    whole = rf"(?:.*?(?:language|text).*?{parts}.*?{names}.*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.{parts}\.(?:{names}))"
    assert LoraConfig(target_modules=whole).targets("model.layers.11.mlp.up_proj")
    assert LoraConfig(target_modules=r"^(?!.*vision).*\.q_proj$").targets("model.layers.0.self_attn.q_proj")
    assert LoraConfig(rank_pattern=((r"layers\.([0-9]|1[0-7])\..*", 4),)).rank("model.layers.3.mlp.up_proj") == 4


def test_codes_refuse_to_be_merged_with_the_remedy(tmp_path):
    import gemmakit

    tiny().save_pretrained(tmp_path)
    model = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path, dtype="float32", quantization_config="int8")
    add_adapter(model, LoraConfig(r=2, target_modules=("q_proj",)))
    with pytest.raises(InputError, match="without quantization"):
        merge_adapter(model)


def adapted(dtype):
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 10).requires_grad_(False)
    made = AdaptedLinear(layer, 3, 0.5)
    torch.nn.init.normal_(made.lora_B)
    return made.to(dtype)


def test_gradients_of_an_adapter_are_its_formulas_and_are_differentiated_again():
    module = adapted(torch.float64)
    x = torch.randn(2, 70, 12, dtype=torch.float64, requires_grad=True)  # more rows than are updated at a time
    few = x.detach()[:, :3].requires_grad_()
    weight = module.weight + module.scaling * module.lora_B @ module.lora_A
    torch.testing.assert_close(module(x), x @ weight.mT + module.bias)
    run = lambda x, A, B: torch.func.functional_call(module, {"lora_A": A, "lora_B": B}, x)  # noqa: E731
    assert torch.autograd.gradcheck(run, (few, module.lora_A, module.lora_B))
    assert torch.autograd.gradgradcheck(run, (few, module.lora_A, module.lora_B))
    plain = torch.func.grad(lambda A: run(x.detach(), A, module.lora_B.detach()).square().sum())(module.lora_A.detach())
    (ours,) = torch.autograd.grad(module(x).square().sum(), module.lora_A)
    torch.testing.assert_close(ours, plain)


def test_an_adapter_keeps_its_input_as_it_came():
    """And nothing as wide as its output: projections that read the same input keep it once."""
    module, kept = adapted(torch.bfloat16), []
    module.lora_A.data, module.lora_B.data = module.lora_A.float(), module.lora_B.float()
    x = torch.randn(2, 70, 12).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    large = [t for t in kept if t.numel() >= 140 * 10]
    assert large and all(t.data_ptr() == x.data_ptr() and t.dtype == x.dtype for t in large)
