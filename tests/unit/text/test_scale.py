"""At the size of Gemma's vocabulary: the figures are printed (`pytest -m slow -s`), the ids are compared."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast
from gemmakit.text.vocabulary_files import ModelFile, Piece


def large_model(model_path: Path, size: int = 256_000) -> ModelFile:
    """The demonstration vocabulary, grown by joining pieces at random."""
    rng = random.Random(0)
    model = ModelFile.read(model_path)
    texts = [piece.text for piece in model.pieces[473:]]
    known = {piece.text for piece in model.pieces}
    while len(known) < size:
        text = rng.choice(texts) + rng.choice(texts[:1500])
        if len(text) <= 16 and text not in known and "\n" not in text and "▁▁" not in text:
            known.add(text)
            texts.append(text)
    model.pieces = model.pieces[:473] + [Piece(text, -float(index)) for index, text in enumerate(texts)]
    return model


@pytest.mark.slow
def test_a_vocabulary_of_256000_pieces_is_built_in_seconds_and_agrees(
    model_path: Path, corpus: list[str], tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(large_model(model_path).to_bytes())
    figures = {}

    def timed(name: str, make: Any) -> Any:
        start = time.monotonic()
        made = make()
        figures[name] = round(time.monotonic() - start, 2)
        return made

    model = timed("read and validate, s", lambda: ModelFile.read(path))
    figures["merges"] = len(timed("recover merges, s", model.merges))
    slow = timed("GemmaTokenizer, s", lambda: GemmaTokenizer(path))
    fast = timed("GemmaTokenizerFast from .model, s", lambda: GemmaTokenizerFast(path))
    timed("the same, merges kept from before, s", lambda: GemmaTokenizerFast(path))
    fast.save_pretrained(tmp_path / "saved")
    again = timed("GemmaTokenizerFast from .json, s", lambda: GemmaTokenizerFast.from_pretrained(tmp_path / "saved"))
    with capsys.disabled():
        print(figures)
    expected = timed("slow encode, s", lambda: slow(corpus, add_special_tokens=False).input_ids)
    assert fast(corpus, add_special_tokens=False).input_ids == expected
    assert again(corpus, add_special_tokens=False).input_ids == expected
