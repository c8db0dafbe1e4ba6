"""Outputs read by attribute, by key and by index; what is None does not exist for the last two."""

import copy
import pickle

import pytest

from gemmakit.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput

CLASSES = ModelOutput.__subclasses__()


def test_fields_stand_in_the_order_that_tuples_rely_on():
    assert list(BaseModelOutputWithPast.__dataclass_fields__) == [
        "last_hidden_state", "past_key_values", "hidden_states", "attentions",
    ]  # fmt: skip
    assert list(CausalLMOutputWithPast.__dataclass_fields__) == [
        "loss", "logits", "past_key_values", "hidden_states", "attentions",
    ]  # fmt: skip


def test_attribute_key_and_index_give_the_same_value():
    out = CausalLMOutputWithPast(loss=1, logits=2, attentions=(3,))
    assert out.loss == out["loss"] == out[0] == 1
    assert out.logits == out["logits"] == out[1] == 2
    assert out.attentions == out["attentions"] == out[2] == out[-1] == (3,)
    assert out[:2] == (1, 2)


def test_none_does_not_exist_but_as_an_attribute():
    out = CausalLMOutputWithPast(logits=2)
    assert out.loss is None
    assert out[0] == 2
    assert out.to_tuple() == (2,)
    assert len(out) == 1
    assert list(out) == [*out.keys()] == ["logits"]
    assert [*out.values()] == [2]
    assert "loss" not in out
    assert "logits" in out
    assert out.get("loss") is None
    assert out.get("loss", 5) == 5
    with pytest.raises(KeyError):
        out["loss"]
    with pytest.raises(IndexError):
        out[1]


def test_false_and_zero_are_values():
    out = CausalLMOutputWithPast(loss=0, logits=())
    assert out.to_tuple() == (0, ())


def test_an_output_spreads_like_a_mapping_and_takes_assignments():
    out = CausalLMOutputWithPast(loss=1)
    out["logits"] = 2
    out.attentions = (3,)
    assert dict(out) == {**out} == {"loss": 1, "logits": 2, "attentions": (3,)}
    out.loss = None
    assert list(out) == ["logits", "attentions"]
    out.loss = 4
    assert list(out.items()) == [("loss", 4), ("logits", 2), ("attentions", (3,))]  # in the fields' order again
    assert out.pop("logits") == 2
    del out["attentions"]
    assert (list(out), out.logits, out.attentions) == (["loss"], None, None)
    with pytest.raises(KeyError, match="no field 'logit'"):
        out["logit"] = 1


@pytest.mark.parametrize("kind", CLASSES)
def test_an_output_is_made_from_what_it_holds_as_libraries_make_mappings(kind):
    """torch's gather gives pairs, accelerate a dictionary; a first field that is one itself stays what it is."""
    out = kind(**{name: [i] for i, name in enumerate(kind.__dataclass_fields__)})
    for twin in (kind(dict(out)), kind((k, v) for k, v in out.items()), kind(iter(out.items()))):
        assert twin == out
        assert list(twin.items()) == list(out.items())
    assert next(iter(kind({"another": 1}).values())) == {"another": 1}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_output_can_be_copied_and_pickled(kind):
    first = next(iter(kind.__dataclass_fields__))
    out = kind(**{first: [1, 2]})
    for twin in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert twin == out
        assert twin[first] == [1, 2]
        assert twin[first] is not out[first]


def test_what_is_taken_out_is_no_attribute_either():
    output = CausalLMOutputWithPast(loss=1, logits=2, hidden_states=(3,))
    assert output.popitem() == ("hidden_states", (3,)) and output.hidden_states is None
    assert output.popitem(last=False) == ("loss", 1) and output.loss is None
    output.clear()
    assert len(output) == 0 and output.logits is None
    with pytest.raises(KeyError, match="CausalLMOutputWithPast"):
        output.popitem()
