"""A tiny checkpoint to tune, and a small file of rows."""

import pytest
import tiny_checkpoint
from tune_tools import WORDS, chat, write


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random model of two layers and Gemma's vocabulary layout."""
    return tiny_checkpoint.make(
        tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=128, initializer_range=0.1
    )


@pytest.fixture
def chats(tmp_path_factory):
    """Twelve chats of uneven lengths."""
    rows = [chat(f"Say {' '.join(WORDS[: 1 + i % 5])}.", " ".join(WORDS[: 1 + i % 7])) for i in range(12)]
    return write(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)
