"""Outputs and caches are what torch's own tools look into: trees, mappings, and things to gather and export."""

import accelerate.utils
import pytest
import torch
import transformers
from tiny_gemma import prompts, tiny
from torch.nn.parallel.scatter_gather import gather
from torch.utils import _pytree

import gemmakit

KINDS = [gemmakit.GemmaModel, gemmakit.GemmaForCausalLM, gemmakit.GemmaForSequenceClassification]
KINDS.append(gemmakit.GemmaForTokenClassification)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_output_is_a_tree_of_its_tensors_and_is_made_from_them_again(kind):
    out = tiny(kind=kind)(prompts(), output_hidden_states=True, output_attentions=True)
    leaves, spec = _pytree.tree_flatten(out)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = _pytree.tree_unflatten(leaves, spec)
    assert (type(again), list(again)) == (type(out), list(out))
    doubled = _pytree.tree_map(lambda x: x * 2, out)
    assert torch.equal(doubled[0], out[0] * 2)
    if "past_key_values" in out:
        assert torch.equal(again.past_key_values[1][1], out.past_key_values[1][1])
    names = [path[0].key for path, _ in _pytree.tree_flatten_with_path(out)[0]]
    assert list(dict.fromkeys(names)) == list(out)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_exported_model_gives_the_model_s_output(kind):
    model, ids = tiny(kind=kind), prompts()
    program = torch.export.export(model, (ids,), {"attention_mask": torch.ones_like(ids)}, strict=False)
    again, out = program.module()(ids, attention_mask=torch.ones_like(ids)), model(ids)
    assert type(again) is type(out)
    torch.testing.assert_close(again[0], out[0])


@torch.no_grad()
def test_accelerate_converts_and_moves_what_an_output_holds():
    """Not a mapping, it would come back as it was: in bfloat16, on its old device."""
    out = tiny().bfloat16()(prompts())
    assert out.logits.dtype == torch.bfloat16
    wide = accelerate.utils.convert_to_fp32(out)
    assert (type(wide), wide.logits.dtype) == (type(out), torch.float32)
    moved = accelerate.utils.send_to_device(out, "meta")
    assert (type(moved), moved.logits.device.type) == (type(out), "meta")


@torch.no_grad()
def test_outputs_of_replicas_are_gathered(monkeypatch):
    """As DataParallel does it, on what there is: each tensor along the batch, in an output again."""
    model, ids = tiny(), prompts(rows=4)
    monkeypatch.setattr(torch.nn.parallel._functions.Gather, "apply", lambda device, dim, *parts: torch.cat(parts, dim))
    whole = gather([model(ids[:1]), model(ids[1:])], "cpu")
    out = model(ids)
    torch.testing.assert_close(whole.logits, out.logits)
    torch.testing.assert_close(whole.past_key_values[1][0], out.past_key_values[1][0])


def test_an_output_is_the_kind_of_thing_that_transformers_gives():
    ours, theirs = gemmakit.CausalLMOutputWithPast, transformers.modeling_outputs.CausalLMOutputWithPast
    assert list(ours.__dataclass_fields__) == list(theirs.__dataclass_fields__)
    for kind in (ours, theirs):
        out = kind(logits=torch.ones(2), attentions=(torch.ones(1),))
        assert isinstance(out, dict)
        assert list(out) == ["logits", "attentions"]
        assert out.to_tuple() == out[:]
        assert len(_pytree.tree_leaves(out)) == 2
