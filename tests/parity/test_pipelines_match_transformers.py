"""The classification pipelines against transformers', on the same files: every option, alone and in batches."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from tiny_checkpoint import tiny_config, write_vocabulary

import gemmakit

# Scores are probabilities, or sums of a few products near 1 in float32, taken in another order.
CLOSE = 2e-5
# Every character one token: of the bytes of others transformers makes words of their own (the last test).
WHOLE = ["def add(self, other):", "", "import os and  two  spaces", "Z went to\nyesterday twice", "x"]
TEXTS = ["def add(self, other):", "", "import os and  two  spaces", "Zoë went to München\nyesterday — twice", "x"]
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
STRATEGIES = ["none", "simple", "first", "average", "max"]


def make(folder: Path, kind: str, **fields) -> Path:
    """A random checkpoint, saved by us, with heads loud enough that labels differ from token to token."""
    vocabulary = write_vocabulary(folder)
    torch.manual_seed(3)
    model = getattr(gemmakit, f"GemmaFor{kind}Classification")(tiny_config(max_position_embeddings=48, **fields))
    with torch.no_grad():
        model.score.weight.normal_(0, 0.7)
    model.save_pretrained(folder)
    gemmakit.GemmaTokenizerFast(str(vocabulary)).save_pretrained(folder)
    return folder


def both(task: str, folder: Path, **options):
    theirs = transformers.pipeline(task, str(folder), device="cpu", dtype=torch.float32, **options)
    ours = gemmakit.pipeline(task, str(folder), device="cpu", dtype=torch.float32, **options)
    return ours, theirs


def same(a, b, where="result"):
    """Equal in shape, keys and values; numbers that are no whole ones within CLOSE."""
    if isinstance(b, dict):
        assert list(a) == list(b), where
        for key in b:
            same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(b, list):
        assert isinstance(a, list), where
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(b, (str, int, type(None))):
        assert a == b, where
    else:
        assert isinstance(a, float), where
        assert a == pytest.approx(float(b), abs=CLOSE, rel=CLOSE), where


KINDS = {
    "three labels": dict(num_labels=3),
    "several at once": dict(num_labels=3, problem_type="multi_label_classification"),
    "one label": dict(num_labels=1),
    "single label said": dict(id2label={0: "bad", 1: "good"}, problem_type="single_label_classification"),
    "regression": dict(num_labels=2, problem_type="regression"),
}


@pytest.fixture(scope="module", params=KINDS)
def text_pipes(request, tmp_path_factory):
    return both("text-classification", make(tmp_path_factory.mktemp("text"), "Sequence", **KINDS[request.param]))


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}], ids=str)
def test_text_classification_gives_what_transformers_gives(text_pipes, options):
    ours, theirs = text_pipes
    pair = {"text": TEXTS[0], "text_pair": TEXTS[2]}
    for inputs in (TEXTS[0], "", TEXTS, TEXTS[:1], pair, [pair, {"text": "x"}]):
        same(ours(inputs, **options), theirs(inputs, **options), f"{inputs!r}")
    same(ours(TEXTS, batch_size=3, **options), theirs(TEXTS, batch_size=3, **options))
    same(list(ours((t for t in TEXTS), **options)), list(theirs((t for t in TEXTS), **options)))


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_the_function_that_is_asked_for_is_applied(text_pipes, function):
    ours, theirs = text_pipes
    options = dict(function_to_apply=function, top_k=None)
    same(ours(TEXTS, **options), theirs(TEXTS, **options))
    same(ours(TEXTS[0], function_to_apply=function), theirs(TEXTS[0], function_to_apply=function))


def test_defaults_of_the_pipeline_and_cut_texts_are_those_of_transformers(text_pipes):
    ours, theirs = text_pipes
    folder = ours.model.name_or_path
    a, b = both("sentiment-analysis", folder, top_k=None, function_to_apply="sigmoid")
    same(a(TEXTS[0]), b(TEXTS[0]))
    same(a(TEXTS), b(TEXTS))
    cut = dict(truncation=True, max_length=7, padding=True)
    same(ours(TEXTS, **cut), theirs(TEXTS, **cut))
    pair = {"text": TEXTS[0] * 3, "text_pair": TEXTS[2]}
    same(ours([pair], **cut), theirs([pair], **cut))


@pytest.fixture(scope="module")
def token_pipes(tmp_path_factory):
    names = dict(enumerate(LABELS))
    return both("token-classification", make(tmp_path_factory.mktemp("token"), "Token", id2label=names))


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("ignored", [None, [], ["O", "PER", "B-PER"]], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_token_classification_gives_what_transformers_gives(token_pipes, strategy, ignored):
    ours, theirs = token_pipes
    texts = TEXTS if strategy == "none" else WHOLE
    options = dict(aggregation_strategy=strategy) | ({} if ignored is None else dict(ignore_labels=ignored))
    same(ours(texts[0], **options), theirs(texts[0], **options))
    same(ours(texts, **options), theirs(texts, **options))
    # In a batch transformers' "index" also counts the padding on the left, so a row's result depends on its mates.
    same(ours(texts, batch_size=3, **options), theirs(texts, **options))
    same(list(ours((t for t in texts), **options)), list(theirs((t for t in texts), **options)))


def test_the_strategies_differ_and_every_label_is_met(token_pipes):
    ours, _ = token_pipes
    met = {e["entity"] for entities in ours(TEXTS, ignore_labels=[]) for e in entities}
    assert met == set(LABELS)
    found = [str(ours(WHOLE, aggregation_strategy=s, ignore_labels=[])) for s in STRATEGIES]
    assert len(set(found)) == len(found)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("stride", [0, 3, 8])
def test_windows_over_a_long_text_give_what_transformers_gives(token_pipes, strategy, stride):
    ours, theirs = token_pipes
    long = [" ".join(WHOLE), "short", "class A:\n    pass " * 5]
    for pipe in (ours, theirs):
        pipe.tokenizer.model_max_length = 14
    try:
        options = dict(aggregation_strategy=strategy, stride=stride, ignore_labels=[])
        same(ours(long, batch_size=2, **options), theirs(long, **options))
        same(ours(long[0], **options), theirs(long[0], **options))
    finally:
        for pipe in (ours, theirs):
            pipe.tokenizer.model_max_length = 48


def test_the_slow_tokenizer_has_no_offsets(token_pipes):
    fast, _ = token_pipes
    slow = gemmakit.pipeline("ner", fast.model, tokenizer=fast.model.name_or_path, use_fast=False)
    for strategy in ("none", "simple"):
        a, b = (pipe(TEXTS, aggregation_strategy=strategy) for pipe in (slow, fast))
        assert all(e["start"] is e["end"] is None for entities in a for e in entities)
        assert [[e["word"] for e in x] for x in a] == [[e["word"] for e in x] for x in b]


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_transformers_takes_the_bytes_of_a_character_for_words(token_pipes, strategy):
    """Its entities overlap and hold U+FFFD; ours are whole (tests/unit/test_classification_pipelines.py)."""
    ours, theirs = (pipe(TEXTS[3], aggregation_strategy=strategy, ignore_labels=[]) for pipe in token_pipes)
    assert any("\ufffd" in e["word"] for e in theirs)
    assert any(a["end"] > b["start"] for a, b in pairwise(theirs))
    assert "".join(e["word"] for e in ours) == TEXTS[3]
