"""The demonstration vocabulary has Gemma's own layout, and training it is deterministic."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemmakit.text.vocabulary_files import ModelFile

LAYOUT = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 5: "<2mass>", 6: "[@BOS@]", 7: "<unused0>",
    105: "<unused98>", 106: "<start_of_turn>", 107: "<end_of_turn>", 108: "\n", 109: "\n\n", 138: "\n" * 31, 139: "▁▁",
    168: "▁" * 31, 169: "<table>", 185: "<h1>", 191: "<blockquote>", 204: "<s>", 216: "</code>", 217: "<0x00>",
    472: "<0xFF>",
}  # fmt: skip


def test_reserved_ids_are_gemmas(shared_slow: Any, shared_fast: Any) -> None:
    for index, text in LAYOUT.items():
        for tokenizer in (shared_slow, shared_fast):
            assert tokenizer.convert_ids_to_tokens(index) == text
            assert tokenizer.convert_tokens_to_ids(text) == index
    assert (shared_slow.pad_token_id, shared_slow.eos_token_id, shared_slow.bos_token_id) == (0, 1, 2)
    assert len(shared_slow) == len(shared_fast) == shared_slow.vocab_size == 2048
    assert shared_slow.get_vocab() == shared_fast.get_vocab()


def test_training_again_gives_the_same_bytes(
    demo_vocabulary: ModuleType, training_texts: list[str], model_path: Path, tmp_path: Path
) -> None:
    again = demo_vocabulary.train(reversed(training_texts), tmp_path / "again.model", vocab_size=2048)
    assert again.read_bytes() == model_path.read_bytes()


def test_a_vocabulary_too_small_for_its_characters_is_refused(demo_vocabulary: ModuleType, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        demo_vocabulary.train(["abcdefgh"], tmp_path, vocab_size=475)


def test_digits_stand_alone(both: Any) -> None:
    assert both.tokenize("123 45") == ["1", "2", "3", "▁", "4", "5"]


def test_reading_and_writing_a_model_changes_nothing(model_path: Path) -> None:
    data = model_path.read_bytes()
    assert ModelFile.parse(data).to_bytes() == data


def test_our_reader_agrees_with_sentencepiece(model_path: Path, sp: Any) -> None:
    pieces = ModelFile.read(model_path).pieces
    assert [piece.text for piece in pieces] == [sp.id_to_piece(index) for index in range(sp.get_piece_size())]
    assert [piece.score for piece in pieces] == [sp.get_score(index) for index in range(sp.get_piece_size())]
    for index, piece in enumerate(pieces):
        assert (piece.type == 3) == sp.is_control(index)
        assert (piece.type == 6) == sp.is_byte(index)
        assert (piece.type == 2) == sp.is_unknown(index)
