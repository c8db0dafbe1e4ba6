"""The Auto classes: the right class for Gemma, a clear refusal for anything else, no torch for data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import make

import gemmakit
from gemmakit import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GemmaConfig
from gemmakit.errors import ConfigError, InputError, UnsafeFile

AUTO = (
    "AutoConfig",
    "AutoTokenizer",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny"))


def test_each_gives_the_gemma_class(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), GemmaConfig)
    assert type(AutoModel.from_pretrained(folder)) is gemmakit.GemmaModel
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is gemmakit.GemmaForCausalLM
    fast, slow = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, use_fast=False)
    assert type(fast) is gemmakit.GemmaTokenizerFast
    assert type(slow) is gemmakit.GemmaTokenizer
    assert fast("def add(").input_ids == slow("def add(").input_ids


def test_classification_heads_are_loaded_with_fresh_heads_and_a_warning(folder):
    for name in ("SequenceClassification", "TokenClassification"):
        with pytest.warns(UserWarning, match="score"):
            model = getattr(gemmakit, f"AutoModelFor{name}").from_pretrained(folder, num_labels=3)
        assert type(model).__name__ == f"GemmaFor{name}"
        assert model.config.num_labels == 3


def test_arguments_reach_the_loader(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.bfloat16, device_map="auto", attn_implementation="eager", low_cpu_mem_usage=True
    )
    assert model.dtype == torch.bfloat16
    assert model.config.attn_implementation == "eager"
    assert AutoConfig.from_pretrained(folder, rms_norm_eps=1e-5).rms_norm_eps == 1e-5
    assert AutoTokenizer.from_pretrained(folder, add_bos_token=False)("x").input_ids[0] != 2


def test_fresh_models_from_a_configuration(folder):
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert AutoModel.from_config(config, dtype="float32").dtype == torch.float32
    with pytest.raises(InputError, match="no argument hidden_size"):
        AutoModel.from_config(config, hidden_size=3)
    with pytest.raises(InputError, match=r"Instead of load_in_8bit: quantization_config=\"int8\"\."):
        AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True)
    with pytest.raises(InputError, match="int8"):
        AutoModel.from_config(config, dtype="int8")
    assert AutoConfig.for_model("gemma", hidden_size=64).hidden_size == 64


@pytest.mark.parametrize("name", AUTO)
def test_another_model_type_is_refused_with_what_runs(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"'llama': gemmakit runs Gemma 1, 1\.1 and CodeGemma"):
        getattr(gemmakit, name).from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", AUTO)
def test_code_of_a_checkpoint_is_never_run(name, folder):
    auto = getattr(gemmakit, name)
    with pytest.raises(UnsafeFile, match="trust_remote_code"):
        auto.from_pretrained(folder, trust_remote_code=True)
    assert auto.from_pretrained(folder, trust_remote_code=False) is not None
    with pytest.raises(InputError, match="from_pretrained"):
        auto()


def test_configuration_and_tokenizer_need_no_torch(folder):
    code = f"""
import sys
from gemmakit import AutoConfig, AutoTokenizer
AutoConfig.from_pretrained({str(folder)!r})
AutoTokenizer.from_pretrained({str(folder)!r})("text")
sys.exit("loaded torch" if "torch" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
