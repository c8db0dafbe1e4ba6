"""The classification pipelines' own laws; what they share with transformers is held in tests/parity."""

from __future__ import annotations

import warnings
from itertools import count, islice, pairwise
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import tiny_config, write_vocabulary

import gemmakit
from gemmakit import TextClassificationPipeline, TokenClassificationPipeline, pipeline
from gemmakit.errors import InputError, NumericalError, PromptTooLong
from gemmakit.pipelines.classification import Piece, gather, lay_over

CONTEXT = 32
TEXTS = ["def add(self, other):", "", "x", "Zoë went to München\nyesterday"]
LONG = "import os and more than fits " * 8
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "LOC"}


def made(folder: Path, kind: str, **fields) -> Path:
    write_vocabulary(folder)
    torch.manual_seed(3)
    model = getattr(gemmakit, f"GemmaFor{kind}Classification")(tiny_config(max_position_embeddings=CONTEXT, **fields))
    with torch.no_grad():
        model.score.weight.normal_(0, 0.7)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextClassificationPipeline:
    return pipeline("text-classification", made(tmp_path_factory.mktemp("s"), "Sequence", num_labels=3), device=-1)


@pytest.fixture(scope="module")
def token(tmp_path_factory) -> TokenClassificationPipeline:
    return pipeline("ner", made(tmp_path_factory.mktemp("t"), "Token", id2label=LABELS), device=-1)


def rounded(value):
    """Scores to six digits: sums over a padded batch run in another order than alone."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else pytest.approx(value, abs=2e-6)


WHOLE = "杰玛🙂 x 젬마, ½杰\n玛"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
@pytest.mark.parametrize("stride", [None, 3])
def test_a_character_is_of_one_entity_however_many_tokens_it_has(token, strategy, stride, seed, monkeypatch):
    """Entities follow one another without overlap, say their own text, and words end only where spaces are.

    transformers counts the bytes of a character as words of their own: spans overlap, and words are U+FFFD.
    """
    weight = token.model.score.weight
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.7
    monkeypatch.setattr(weight, "data", drawn)
    text = WHOLE * (2 if stride else 1)
    found = token(text, aggregation_strategy=strategy, ignore_labels=[], stride=stride)
    assert all(a["end"] <= b["start"] for a, b in pairwise(found))
    assert "".join(e["word"] for e in found) == text or stride
    assert all(e["word"] == text[e["start"] : e["end"]] for e in found)
    if strategy != "simple" and not stride:
        assert all(e["start"] == 0 or " " in text[e["start"] - 1 : e["start"] + 1] for e in found)


def test_a_character_is_of_one_entity_with_the_slow_tokenizer(token):
    slow = pipeline("ner", token.model, tokenizer=token.model.name_or_path, use_fast=False)
    found = slow(WHOLE, aggregation_strategy="simple", ignore_labels=[])
    assert [e["word"] for e in found] == [
        e["word"] for e in token(WHOLE, aggregation_strategy="simple", ignore_labels=[])
    ]


@pytest.mark.parametrize("rope", ["default", "dynamic"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_do_not_depend_on_batch_mates(text, token, size, rope, monkeypatch):
    if rope == "dynamic":  # whose frequencies depend on how long the batch is
        for pipe in (text, token):
            rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
            monkeypatch.setattr(pipe.model.config, "rope_parameters", rope)
        assert len(text._together([[2], [2, 3], [2]])) == 2
    assert text(TEXTS, batch_size=size, top_k=None) == [rounded(text(t, top_k=None)) for t in TEXTS]
    for strategy in ("none", "simple", "average"):
        options = dict(aggregation_strategy=strategy, ignore_labels=[])
        assert token(TEXTS, batch_size=size, **options) == [rounded(token(t, **options)) for t in TEXTS]


def test_what_is_longer_than_the_context_is_cut_aloud(text, token):
    for pipe, options in ((text, {}), (token, {"ignore_labels": []})):
        with pytest.warns(UserWarning, match=rf"text 1 of this batch has \d+ tokens, but {CONTEXT} are the limit"):
            cut = pipe(["x", LONG, "y"], batch_size=3, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pipe(["x", LONG, "y"], batch_size=3, truncation=True, **options) == rounded(cut)
        with pytest.raises(PromptTooLong, match="truncation=True"):
            pipe(LONG, truncation=False)
    assert len(cut[1]) == CONTEXT - 1  # without <bos>


def test_windows_read_all_of_a_long_text_in_order(token):
    options = dict(aggregation_strategy="simple", ignore_labels=[])
    found = token(LONG, stride=8, **options)
    assert found[-1]["end"] > len(LONG) - 4
    starts = [e["start"] for e in found]
    assert starts == sorted(starts)
    assert all(LONG[e["start"] : e["end"]] == e["word"] for e in found)
    assert token(TEXTS[0], stride=8, **options) == token(TEXTS[0], **options)


def test_an_iterator_is_read_only_as_far_as_asked(text):
    read = []

    def endless():
        for number in count():
            read.append(number)
            yield f"x{number}"

    results = text(endless(), batch_size=2)
    assert read == []
    assert list(islice(results, 3)) == [rounded(text(f"x{i}")[0]) for i in range(3)]
    assert len(read) == 4
    assert text([]) == []


def test_a_model_in_training_is_read_without_dropout_and_goes_on_training(token):
    expected = token(TEXTS[0])
    token.model.train()
    try:
        assert token(TEXTS[0]) == expected
        assert token.model.training
    finally:
        token.model.eval()


def test_scores_that_are_no_numbers_are_an_error(text):
    weight = text.model.score.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(NumericalError, match="not finite"):
            text("x")
    finally:
        weight.data.copy_(kept)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(top_k=0), "top_k is 0"),
        (dict(top_k=True), "top_k is True"),
        (dict(function_to_apply="relu"), "function_to_apply is 'relu'"),
        (dict(max_new_tokens=3), "no option 'max_new_tokens'; it has top_k"),
    ],
)
def test_options_of_text_classification_are_checked(text, options, said):
    with pytest.raises(InputError, match=said):
        text("x", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(aggregation_strategy="best"), "aggregation_strategy is 'best'"),
        (dict(stride=4), "pass an aggregation_strategy"),
        (dict(stride=CONTEXT, aggregation_strategy="simple"), "stride 32 must be below"),
        (dict(top_k=1), "no option 'top_k'"),
    ],
)
def test_options_of_token_classification_are_checked(token, options, said):
    with pytest.raises(InputError, match=said):
        token("x", **options)


def test_the_slow_tokenizer_cannot_find_words(token):
    slow = pipeline("ner", token.model, tokenizer=token.model.name_or_path, use_fast=False)
    for options in (dict(aggregation_strategy="first"), dict(aggregation_strategy="simple", stride=2)):
        with pytest.raises(InputError, match="needs the fast tokenizer"):
            slow("x", **options)


@pytest.mark.parametrize("inputs", [3, {"txt": "x"}, {"text": 3}, [["x", "y"]], ["x", None]])
def test_inputs_that_are_no_texts_are_refused(text, inputs):
    with pytest.raises(InputError, match="text-classification takes a text or a pair"):
        text(inputs)


def test_a_model_of_another_kind_is_refused(text, token):
    causal = gemmakit.GemmaForCausalLM(text.model.config)
    with pytest.raises(InputError, match="needs a PyTorch model with labels"):
        TextClassificationPipeline(causal, text.tokenizer)
    with pytest.raises(InputError, match="scores every token"):
        TextClassificationPipeline(token.model, token.tokenizer)("x")
    with pytest.raises(InputError, match="scores whole texts"):
        TokenClassificationPipeline(text.model, text.tokenizer)("x")
    with pytest.raises(InputError, match="text-classification needs model="):
        pipeline("sentiment-analysis")


# -- entities, by hand


def piece(word, scores, start, continues=False):
    return Piece(word, scores, start, start, start + len(word), continues)


def test_words_get_the_label_that_their_strategy_says():
    pieces = [
        piece("New", [0.1, 0.6, 0.2, 0.1], 0),
        piece("ton", [0.05, 0.0, 0.05, 0.9], 3, continues=True),
        piece("is", [0.8, 0.1, 0.05, 0.05], 7),
    ]
    found = {s: [e["entity_group"] for e in gather(pieces, s, LABELS, "".join)] for s in ("simple", "first", "max")}
    assert found == {"simple": ["PER", "LOC", "O"], "first": ["PER", "O"], "max": ["LOC", "O"]}
    word, rest = gather(pieces, "average", LABELS, "".join)
    assert (word["entity_group"], word["word"], word["start"], word["end"]) == ("LOC", "Newton", 0, 6)
    assert word["score"] == pytest.approx(0.5)
    assert rest["score"] == 0.8


def test_a_new_entity_begins_at_b_and_at_another_tag():
    sure = {name: [float(i == j) for j in LABELS] for i, name in LABELS.items()}
    names = ["B-PER", "I-PER", "B-PER", "LOC", "LOC", "I-PER"]
    found = gather([piece("w", sure[n], i) for i, n in enumerate(names)], "simple", LABELS, "".join)
    assert [(e["entity_group"], e["start"], e["end"]) for e in found] == [
        ("PER", 0, 2), ("PER", 2, 3), ("LOC", 3, 5), ("PER", 5, 6),
    ]  # fmt: skip


def test_of_overlapping_entities_the_longer_then_the_likelier_stays():
    def entity(start, end, score):
        return dict(start=start, end=end, score=score)

    assert lay_over([]) == []
    kept = lay_over([entity(4, 6, 0.9), entity(0, 3, 0.5), entity(0, 2, 0.9), entity(4, 6, 0.8), entity(6, 7, 0.1)])
    assert kept == [entity(0, 3, 0.5), entity(4, 6, 0.9), entity(6, 7, 0.1)]
    assert lay_over([entity(0, 2, 0.4), entity(0, 2, 0.5)]) == [entity(0, 2, 0.5)]
