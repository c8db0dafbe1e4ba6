"""Names that code written for transformers imports: they are here, take the same arguments, and do the same."""

import inspect

import pytest
import torch
import transformers

import gemmakit
from gemmakit.errors import InputError

V, EOS = 40, [1, 7]
PROMPT = torch.randint(2, V, (3, 5))
# What each is made of, as transformers documents it.
PROCESSORS = {
    "MinLengthLogitsProcessor": (9, EOS),
    "MinNewTokensLengthLogitsProcessor": (5, 3, EOS),
    "TemperatureLogitsWarper": (0.7,),
    "RepetitionPenaltyLogitsProcessor": (1.5,),
    "EncoderRepetitionPenaltyLogitsProcessor": (1.5, PROMPT),
    "TopKLogitsWarper": (5,),
    "TopPLogitsWarper": (0.6,),
    "MinPLogitsWarper": (0.3,),
    "TopHLogitsWarper": (0.5,),
    "TypicalLogitsWarper": (0.6,),
    "EpsilonLogitsWarper": (0.05,),
    "EtaLogitsWarper": (0.05,),
    "NoRepeatNGramLogitsProcessor": (2,),
    "EncoderNoRepeatNGramLogitsProcessor": (2, PROMPT),
    "SequenceBiasLogitsProcessor": ({(3,): 2.0, (4, 5): -1.0},),
    "NoBadWordsLogitsProcessor": ([[3], [4, 5], [1]], EOS),
    "PrefixConstrainedLogitsProcessor": (lambda row, ids: [2 + row, 5, int(ids[-1])], 1),
    "ForcedBOSTokenLogitsProcessor": (2,),
    "ForcedEOSTokenLogitsProcessor": (8, EOS),
    "InfNanRemoveLogitsProcessor": (),
    "ExponentialDecayLengthPenalty": ((1, 1.5), EOS, 5),
    "LogitNormalization": (),
    "SuppressTokensLogitsProcessor": ([3, 4],),
    "SuppressTokensAtBeginLogitsProcessor": ([3, 4], 7),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_does_what_that_of_its_name_does(name):
    made = [getattr(library, name)(*PROCESSORS[name]) for library in (gemmakit, transformers)]
    assert isinstance(made[0], gemmakit.LogitsProcessor)
    for n in (1, 5, 7, 8, 9):
        ids, scores = torch.randint(2, V, (3, n)), torch.randn(3, V) * 3
        ours, theirs = (processor(ids, scores.clone()) for processor in made)
        torch.testing.assert_close(ours, theirs.to(ours.dtype))


@pytest.mark.parametrize("name", ["TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper"])
def test_what_shapes_a_distribution_leaves_as_many_tokens_as_it_is_told(name):
    asked = {"TopKLogitsWarper": 1, "TopPLogitsWarper": 0.01, "MinPLogitsWarper": 0.99, "TypicalLogitsWarper": 0.01}[
        name
    ]
    scores = torch.randn(3, V)
    for library in (gemmakit, transformers):
        left = getattr(library, name)(asked, min_tokens_to_keep=3)(PROMPT, scores.clone())
        assert (left.isfinite().sum(-1) == 3).all()
    with pytest.raises(InputError, match="filter_value"):
        getattr(gemmakit, name)(asked, filter_value=0.0)


def test_a_value_out_of_range_is_refused():
    for name, value in (
        ("TemperatureLogitsWarper", 0.0),
        ("TopPLogitsWarper", 2.0),
        ("NoRepeatNGramLogitsProcessor", 0),
    ):
        with pytest.raises(InputError, match=f"is {value}; it must be"):
            getattr(gemmakit, name)(value)


def test_criteria_end_the_rows_that_those_of_their_names_end():
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model())
    theirs = transformers.AutoTokenizer.from_pretrained(gemmakit.demo_model())
    ids = torch.tensor([tokenizer("a stop", add_special_tokens=False).input_ids[-2:], [5, 1], [6, 8]])
    for name, ours, other in (
        ("MaxLengthCriteria", (2,), (2,)), ("MaxLengthCriteria", (3,), (3,)), ("EosTokenCriteria", (EOS,), (EOS,)),
        ("MaxTimeCriteria", (100.0,), (100.0,)), ("MaxTimeCriteria", (1.0, 0.0), (1.0, 0.0)),
        ("StopStringCriteria", (tokenizer, ["stop", "x!"]), (theirs, ["stop", "x!"])),
    ):  # fmt: skip
        a = getattr(gemmakit, name)(*ours)(ids, None)
        assert a.tolist() == getattr(transformers, name)(*other)(ids, None).tolist(), name


ALIASES = {
    "PreTrainedModel": "GemmaPreTrainedModel", "PreTrainedConfig": "GemmaConfig", "PretrainedConfig": "GemmaConfig",
    "PreTrainedTokenizer": "GemmaTokenizer", "PreTrainedTokenizerFast": "GemmaTokenizerFast",
    "TokenizersBackend": "GemmaTokenizerFast",
}  # fmt: skip


@pytest.mark.parametrize("name", ALIASES)
def test_a_base_class_is_that_of_every_model(name):
    assert getattr(gemmakit, name) is getattr(gemmakit, ALIASES[name])


def test_the_other_names_are_here():
    for name in (
        "ModelOutput",
        "GenerateDecoderOnlyOutput",
        "GenerateBeamDecoderOnlyOutput",
        "AddedToken",
        "Constraint",
    ):
        assert inspect.isclass(getattr(gemmakit, name))
    assert gemmakit.AggregationStrategy.FIRST == "first"
    assert [s.value for s in gemmakit.AggregationStrategy] == ["none", "simple", "first", "average", "max"]
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        gemmakit.NoSuchName


def test_a_seed_is_that_of_all_generators():
    drawn = []
    for seed in (gemmakit.set_seed, transformers.set_seed):
        seed(5)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1]
    with pytest.raises(InputError, match="seed is -1"):
        gemmakit.set_seed(-1)
