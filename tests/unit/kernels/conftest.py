"""Fixtures of the fused layers' tests."""

import pytest
import torch

import gemmakit.pytorch.model as model_file


@pytest.fixture
def threads(request):
    before, wanted = torch.get_num_threads(), getattr(request, "param", 1)
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


@pytest.fixture
def modules_only(monkeypatch):
    """A function that runs another without seams."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(model_file, "fused_layer", lambda *_, **__: None)
            with torch.no_grad():
                return function()

    return run
