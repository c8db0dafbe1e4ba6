"""Other people's tools on the demo model: `make clients` runs each script in an environment of its own."""

import os

import pytest


def pytest_ignore_collect(collection_path, config):
    """What they need is not there where the other tests run."""
    return None if os.environ.get("GEMMAKIT_CLIENTS") or collection_path.name == "conftest.py" else True


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "clients":
            item.add_marker("client")
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def name():
    """The demo model's folder."""
    gemmakit = pytest.importorskip("gemmakit")
    return str(gemmakit.demo_model())


@pytest.fixture
def model(name):
    import torch

    import gemmakit

    return gemmakit.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


@pytest.fixture
def theirs(name):
    """The same in transformers."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(name):
    import gemmakit

    return gemmakit.AutoTokenizer.from_pretrained(name)


@pytest.fixture
def ids(tokenizer):
    """(1, S)"""
    return tokenizer("If the file is there", return_tensors="pt").input_ids


@pytest.fixture
def registered():
    from gemmakit.integrations import register_transformers, unregister_transformers

    register_transformers()
    yield
    unregister_transformers()
