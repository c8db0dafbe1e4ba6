"""transformers 4.46.3, the last with FlaxGemma: its checkpoints are read, and its numbers come out.

The fixture is written by scripts/make_flax_fixtures.py.
"""

from pathlib import Path

import numpy as np
import pytest
from flax_tools import apart, flat

from gemmakit.flax import FlaxGemmaForCausalLM, FlaxGemmaModel

FOLDER = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def theirs():
    with np.load(FOLDER / "outputs.npz") as held:
        return dict(held)


@pytest.fixture(scope="module")
def model():
    return FlaxGemmaForCausalLM.from_pretrained(FOLDER / "as_flax")


def test_parameter_names_are_those_of_released_flax_checkpoints(model):
    paths = flat(model.params)
    assert "model/layers/0/self_attn/q_proj/kernel" in paths
    assert {p.split("/")[-1] for p in paths} == {"kernel", "embedding", "weight"}
    assert not any(p.startswith("lm_head") for p in paths)  # tied
    assert model.required_params == {tuple(p.split("/")) for p in paths}


@pytest.mark.parametrize("form", ["as_flax", "as_pytorch"])
def test_checkpoints_of_4_46_3_give_its_flax_logits(theirs, form):
    model = FlaxGemmaForCausalLM.from_pretrained(FOLDER / form)
    ids, mask = theirs["ids"], theirs["mask"]
    out = model(ids, mask, np.maximum(mask.cumsum(-1) - 1, 0), output_hidden_states=True, output_attentions=True)
    assert apart(out.logits, theirs["logits"], mask) < 1e-5
    for mine, other in zip(out.hidden_states, theirs["hidden_states"], strict=True):
        assert apart(mine, other, mask) < 1e-5
    for mine, other in zip(out.attentions, theirs["attentions"], strict=True):
        assert apart(np.swapaxes(mine, 1, 2), np.swapaxes(other, 1, 2), mask) < 1e-5
    assert apart(model(ids, mask).logits, theirs["pytorch_logits"], mask) < 1e-5


def test_cached_steps_give_its_cached_steps(model, theirs):
    ids, mask = theirs["ids"], theirs["mask"]
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    out = model(ids[:, :6], mask, positions[:, :6], past_key_values=model.init_cache(*ids.shape))
    steps = [out.logits]
    for at in range(6, ids.shape[1]):
        out = model(ids[:, at : at + 1], mask, positions[:, at : at + 1], past_key_values=out.past_key_values)
        steps.append(out.logits)
    assert apart(np.concatenate(steps, axis=1), theirs["stepped"], mask) < 1e-5


def test_greedy_tokens_are_its_tokens(model, theirs):
    new = theirs["greedy"].shape[1] - theirs["ids"].shape[1]
    out = model.generate(theirs["ids"], attention_mask=theirs["mask"], max_new_tokens=new, eos_token_id=None)
    eos = theirs["greedy"] == 1
    before_end = np.cumsum(eos[:, -new:], axis=1) - eos[:, -new:] == 0
    assert before_end.any(-1).all()
    np.testing.assert_array_equal(
        np.asarray(out.sequences)[:, -new:][before_end], theirs["greedy"][:, -new:][before_end]
    )


def test_the_bare_model_opens_the_same_checkpoint(theirs):
    bare = FlaxGemmaModel.from_pretrained(FOLDER / "as_flax")
    ids, mask = theirs["ids"], theirs["mask"]
    assert apart(bare(ids, mask).last_hidden_state, theirs["hidden_states"][-1], mask) < 1e-5
