"""What transformers' classes say of gemmakit's objects once they are registered; nothing else changes."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import gemmakit
from gemmakit.family import KINDS
from gemmakit.integrations import register_transformers, unregister_transformers

TINY = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=32)  # fmt: skip


@pytest.fixture
def registered():
    register_transformers()
    yield
    unregister_transformers()


@pytest.fixture(scope="module")
def objects():
    """One of each kind, made before anybody registers."""
    name = gemmakit.demo_model()
    model = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**TINY)).eval()
    fast, slow = (gemmakit.AutoTokenizer.from_pretrained(name, use_fast=use) for use in (True, False))
    with torch.no_grad():
        out = model(torch.tensor([[2, 5, 6]]), use_cache=True)
    settings = gemmakit.GenerationConfig(max_new_tokens=3)
    return dict(model=model, config=model.config, settings=settings, fast=fast, slow=slow, batch=fast("a b"),
                output=out, cache=out.past_key_values, static=gemmakit.StaticCache(model.config))  # fmt: skip


CLASSES = {
    "model": "GemmaForCausalLM", "config": "PretrainedConfig", "settings": "GenerationConfig",
    "fast": "PreTrainedTokenizerFast", "slow": "PreTrainedTokenizer", "batch": "BatchEncoding", "cache": "DynamicCache",
    "static": "StaticCache",
}  # fmt: skip


def test_each_object_passes_for_the_class_that_transformers_has_for_it(objects, registered):
    for name, kind in CLASSES.items():
        assert isinstance(objects[name], getattr(transformers, kind)), name
        assert type(objects[name]).__module__.startswith("gemmakit."), name
    assert isinstance(objects["model"], transformers.PreTrainedModel | transformers.GenerationMixin)
    assert isinstance(objects["fast"], transformers.PreTrainedTokenizerBase)
    assert not isinstance(objects["slow"], transformers.PreTrainedTokenizerFast)
    assert isinstance(objects["output"], transformers.modeling_outputs.CausalLMOutputWithPast)
    assert isinstance(objects["model"], gemmakit.GemmaForCausalLM)


@pytest.mark.parametrize("member", [m for m, kind in KINDS.items() if hasattr(transformers, kind.classes["config"])])
def test_every_member_passes_for_its_own_class(member, registered):
    classes = KINDS[member].classes
    config = getattr(gemmakit, classes["config"])(**TINY, layer_types=None)
    with torch.device("meta"):
        model = getattr(gemmakit, classes["causal_lm"])(config)
    assert isinstance(model, getattr(transformers, classes["causal_lm"]))
    assert isinstance(config, getattr(transformers, classes["config"]))


def test_a_class_of_the_users_own_passes_for_the_one_it_is_made_of(registered):
    class Mine(gemmakit.GemmaForCausalLM):
        pass

    assert isinstance(Mine(gemmakit.GemmaConfig(**TINY)), transformers.GemmaForCausalLM)


@pytest.mark.parametrize("name", ["model", "config", "settings", "fast", "slow", "batch", "cache"])
def test_objects_are_pickled_and_copied_as_before(name, objects, registered):
    """What was pickled is read without transformers too: see `remade`."""
    value = objects[name]
    packed = pickle.dumps(value)
    for again in (pickle.loads(packed), copy.copy(value)):
        assert type(again) is type(value)
        assert isinstance(again, getattr(transformers, CLASSES[name]))
    assert b"transformers" not in packed.replace(b"register_transformers", b"")
    if name != "cache":  # its tensors belong to no gradient's graph only where they are made without one
        assert type(copy.deepcopy(value)) is type(value)


def test_nothing_computes_otherwise(objects):
    model, ids = objects["model"], torch.tensor([[2, 5, 6]])
    before = model.generate(ids, max_new_tokens=5, eos_token_id=None)
    register_transformers()
    try:
        assert torch.equal(model.generate(ids, max_new_tokens=5, eos_token_id=None), before)
    finally:
        unregister_transformers()


def test_it_is_undone(objects):
    register_transformers()
    register_transformers()
    unregister_transformers()
    for name, kind in CLASSES.items():
        assert not isinstance(objects[name], getattr(transformers, kind)), name
        assert objects[name].__class__ is type(objects[name])


def test_a_library_may_still_give_an_object_another_class(registered):
    """As FSDP does with the modules that it shards."""
    config = gemmakit.GemmaConfig(**TINY)
    kind = type("Sharded", (type(config),), {})
    config.__class__ = kind
    assert type(config) is kind and isinstance(config, transformers.GemmaConfig)


def test_nothing_of_transformers_is_imported_before_it_is_asked_for():
    program = "import sys, gemmakit.integrations\nassert 'transformers' not in sys.modules\n"
    hidden = (
        "sys.modules['transformers'] = None\ntry: gemmakit.integrations.register_transformers()\n"
        "except gemmakit.errors.MissingDependency as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", program + hidden], capture_output=True, text=True, check=True)
    assert "pip install 'gemmakit[transformers]'" in done.stdout


def test_the_page_says_which_clients_need_it():
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "transformers.md").read_text(encoding="utf-8")
    told = page.partition("<!-- the scripts of tests/clients that register -->")[2].partition("\n\n")[0]
    needed, others = (re.sub(r"[^a-z]", "", part.lower()) for part in told.split(" need.", 1))
    scripts = {
        path.stem.removeprefix("test_client_").replace("_", ""): "registered" in path.read_text(encoding="utf-8")
        for path in (root / "tests" / "clients").glob("test_client_*.py")
    }
    assert len(scripts) >= 17
    for client, registers in scripts.items():
        assert (client in needed, client in others) == (registers, not registers), client
