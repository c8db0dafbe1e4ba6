"""Models whose parameters are shared out over processes are trained, saved and read as those of one process."""

from pathlib import Path

import pytest
import torch
from sharded_script import apart, config, trained
from together import together

from gemmakit import GemmaForCausalLM
from gemmakit.errors import CheckpointError
from gemmakit.pytorch.parallel.sharded import load_sharded, save_sharded

SCRIPT = Path(__file__).with_name("sharded_script.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def one(folder):
    """A model that one process saved after two steps, with its optimizer, and trained for a third."""
    torch.manual_seed(0)
    model = GemmaForCausalLM(config("gqa")).train()
    optimizer = trained(model)
    save_sharded(folder / "one-parts", model, optimizer, {"step": 2})
    trained(model, 1, optimizer)
    return model


@pytest.fixture(scope="module")
def found(folder, one):
    return together(SCRIPT, folder)


@pytest.mark.parametrize("member", ["gemma", "gemma4"])
def test_two_processes_train_the_model_that_one_trains(found, member):
    for one in found:
        # In float32, after AdamW's second step of 0.01: sums of other orders, divided by roots of their squares.
        assert one[member]["apart"] < 2e-4
        assert one[member]["tied"]


@pytest.mark.parametrize("member", ["gemma", "gemma4"])
def test_a_process_keeps_its_part_of_the_parameters(found, member):
    parts = [one[member]["part"] for one in found]
    assert sum(parts) == pytest.approx(1.0)
    assert max(parts) < 0.55  # a tensor of an odd number of rows is split unevenly


@pytest.mark.parametrize("member", ["gemma", "gemma4"])
def test_training_goes_on_from_parts_as_if_nothing_had_happened(found, member):
    assert [one[member]["went_on"] for one in found] == [True, True]
    assert [one[member]["extra"] for one in found] == [{"step": 2}] * 2


def test_parts_of_two_processes_are_read_by_one(found, folder):
    want = GemmaForCausalLM.from_pretrained(folder / "gemma-out")
    model = GemmaForCausalLM(want.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    assert load_sharded(folder / "gemma-parts", model, optimizer, {"step": 0}) == {"step": 2}
    for name, tensor in want.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_two_processes_go_on_from_what_one_saved_with_its_optimizer(found, folder, one):
    assert [each["from one"] for each in found] == [{"step": 2}] * 2
    # As above, in float32; with moments that are lost a step is ten times as far off, and more.
    assert apart(GemmaForCausalLM.from_pretrained(folder / "from-one"), one) < 2e-4


def test_parts_of_one_process_are_read_again(found, folder, tmp_path):
    model = GemmaForCausalLM.from_pretrained(folder / "gemma-out")
    save_sharded(tmp_path / "one", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    other = GemmaForCausalLM(model.config)
    load_sharded(tmp_path / "one", other)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())
    with pytest.raises(CheckpointError, match="does not fit"):
        load_sharded(folder / "gemma4-parts", other)


def test_what_is_wrong_is_said_in_every_process(found):
    for one in found:
        assert "cannot be" in one["full"] or "failed" in one["full"]
        assert "exists: name a new folder" in one["there"]
        assert "is no checkpoint of save_sharded" in one["none"]
