"""A large SentencePiece model's merges are recovered once and kept."""

import json

import pytest

from gemmakit import GemmaTokenizerFast
from gemmakit.text import rust
from gemmakit.text.vocabulary_files import ModelFile


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_second_start_reads_what_the_first_recovered(model_path, cache, monkeypatch):
    monkeypatch.setattr(rust, "WORTH_CACHING", 1000)
    text = "for i in range(10):\n\tprint(i)  # été 漢字"
    first = GemmaTokenizerFast(model_path).encode(text)
    (kept,) = cache.rglob("tokenizer.json")
    monkeypatch.setattr(ModelFile, "merges", lambda self: pytest.fail("merges recovered a second time"))
    assert GemmaTokenizerFast(model_path).encode(text) == first

    kept.write_text(json.dumps({"model": "damaged"}))
    monkeypatch.undo()
    assert GemmaTokenizerFast(model_path).encode(text) == first


def test_small_vocabularies_leave_no_files(model_path, cache):
    GemmaTokenizerFast(model_path)
    assert not cache.exists()
