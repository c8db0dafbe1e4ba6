"""A tiny model with a real vocabulary in Gemma's layout, and both tokenizers of it."""

import importlib
import inspect

import demo_vocabulary
import pytest
import torch

import gemmakit

TEXT = 'Größe façade naïve 杰玛 ジェマ 젬마 🙂 👍🏽 ½ ² ∑ → «…»\n{"key": [1, 2.5, true, null]}\n'
TEXT += "<table><tr><td>1</td></tr>\n"


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory):
    texts = [*(inspect.getsource(importlib.import_module(n)) for n in ("argparse", "typing", "textwrap")), TEXT * 8]
    return demo_vocabulary.train(texts, tmp_path_factory.mktemp("vocabulary"), vocab_size=1024)


@pytest.fixture(scope="session")
def slow(vocabulary_file):
    return gemmakit.GemmaTokenizer(vocabulary_file)


@pytest.fixture(scope="session")
def fast(vocabulary_file):
    return gemmakit.GemmaTokenizerFast(vocabulary_file)


@pytest.fixture(params=["slow", "fast"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def make_model(vocabulary, seed=0):
    config = gemmakit.GemmaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    model = gemmakit.GemmaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def model(slow):
    """Its vocabulary has six ids more than the tokenizer, as padded embeddings have."""
    return make_model(len(slow.get_vocab()) + 6)


@pytest.fixture(scope="session")
def small_model():
    """No tokenizer: 90 ids."""
    return make_model(90)
