"""The fast path is compared with the plain one, and a fault is told from a near tie."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from agreement import _off, agreement, modules_alone

from gemmakit.pytorch.kernels import triton

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))
from tiny_gemma import prompts, tiny


@contextmanager
def scaled(weight, factor):
    """In the place of the plain path: the same model with one weight off."""
    with torch.no_grad():
        weight.mul_(factor)
        yield
        weight.div_(factor)


def compared(factor):
    model = tiny()
    weight = model.model.layers[0].mlp.down_proj.weight
    return agreement(model, prompts(1, 20), 16, lambda: scaled(weight, factor))


def test_equal_paths_agree():
    found = compared(1.0)
    assert found == {"tokens": 16, "replayed_same": 16, "same": 16, "logits_off": 0.0, "wrong": False}


def test_a_rounding_is_no_fault():
    found = compared(1.0 + 1e-4)
    assert 0 < found["logits_off"] < 0.01 and not found["wrong"]
    assert found["same"] == 16 or found["near_tie"]


def test_a_fault_is_seen():
    found = compared(-3.0)
    assert found["wrong"] and found["logits_off"] > 0.25


def test_numbers_that_are_none_are_a_fault():
    model = tiny()
    out = agreement(model, prompts(1, 20), 4)
    assert not out["wrong"]
    assert _off(torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 2.0])) == float("inf")


@pytest.mark.parametrize("before", [None, "1"])
def test_triton_is_turned_off_in_words_and_on_again(before, monkeypatch):
    monkeypatch.delenv("GEMMAKIT_TRITON", raising=False)
    if before is not None:
        monkeypatch.setenv("GEMMAKIT_TRITON", before)
    with modules_alone():
        assert triton.decision(torch.device("cuda")).why == "Triton kernels: GEMMAKIT_TRITON is 0"
    assert os.environ.get("GEMMAKIT_TRITON") == before
    assert triton.decision(torch.device("cuda")).why != "Triton kernels: GEMMAKIT_TRITON is 0"
