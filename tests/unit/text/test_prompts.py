"""A prompt by name stands in front of each text; nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemmakit.errors import InputError, TokenizerError
from gemmakit.text.prompts import SENTENCE_TRANSFORMERS, Prompts

CONFIG = {
    "model_type": "SentenceTransformer",
    "prompts": {"query": "task: search result | query: ", "document": "title: none | text: "},
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}


def written(folder: Path, config: Any) -> Path:
    (folder / SENTENCE_TRANSFORMERS).write_text(json.dumps(config))
    return folder


def test_prompts_stand_in_front_of_texts(tmp_path: Path) -> None:
    prompts = Prompts.from_pretrained(written(tmp_path, CONFIG))
    assert prompts.apply(["a", ""], "query") == ["task: search result | query: a", "task: search result | query: "]
    assert prompts.apply(["a"]) == ["a"]
    assert prompts.apply(["a"], prompt="b: ") == ["b: a"]
    default = Prompts.from_pretrained(written(tmp_path, {**CONFIG, "default_prompt_name": "document"}))
    assert default.apply(["a"]) == ["title: none | text: a"]
    assert default.apply(["a"], prompt="") == ["a"]


def test_a_folder_without_prompts_has_none(tmp_path: Path) -> None:
    assert Prompts.from_pretrained(tmp_path).apply(["a"]) == ["a"]


def test_an_unknown_name_is_refused_with_those_there_are(tmp_path: Path) -> None:
    prompts = Prompts.from_pretrained(written(tmp_path, CONFIG))
    with pytest.raises(InputError, match=r"no prompt 'qeury'.*'query', 'document'"):
        prompts.apply(["a"], "qeury")
    with pytest.raises(InputError, match="both given"):
        prompts.apply(["a"], "query", "x")


@pytest.mark.parametrize(
    "config",
    [[], {"prompts": ["a"]}, {"prompts": {"query": 3}}, {"prompts": {"a": "b"}, "default_prompt_name": "c"}],
)
def test_a_malformed_file_is_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(TokenizerError, match=SENTENCE_TRANSFORMERS):
        Prompts.from_pretrained(written(tmp_path, config))
