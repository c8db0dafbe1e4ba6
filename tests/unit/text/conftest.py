"""A small vocabulary in Gemma's layout, trained once a session, and the tokenizers made from it."""

from __future__ import annotations

import importlib
import inspect
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast

SAMPLE = """Gemma היא משפחה של מודלים. Gemma è una famiglia di modelli aperti, leggeri e all'avanguardia.
Джемма — это семейство лёгких открытых моделей. 젬마는 가벼운 개방형 모델입니다. ジェマは軽量なモデルです。
杰玛是一系列轻量级的开放模型。 जेम्मा हल्के मॉडल हैं। เจมม่าเป็นโมเดลขนาดเล็ก Τζέμα είναι ανοιχτά μοντέλα.
نماذج جيما خفيفة ومفتوحة المصدر Größe, façade, naïve, żółć, İstanbul,
½ ² ³ ﬁ ﬂ Å Å é é 🙂 👍🏽 👩‍👩‍👧‍👦 🇬🇧 ∑ ∫ √ ≈ → «…» “—”
def add(a, b):\n    return a + b  # 12345 + 67890\n\n\nclass A:\n\tpass\n<table><tr><td>1</td></tr></table>
--------------------------------------------------------------------------------
================================================================================
"""


def stdlib(*names: str) -> list[str]:
    return [inspect.getsource(importlib.import_module(name)) for name in names]


@pytest.fixture(scope="session")
def demo_vocabulary() -> ModuleType:
    import demo_vocabulary

    return demo_vocabulary


@pytest.fixture(scope="session")
def training_texts() -> list[str]:
    return [*stdlib("argparse", "typing", "textwrap", "collections", "statistics"), SAMPLE * 8]


@pytest.fixture(scope="session")
def model_path(demo_vocabulary: ModuleType, training_texts: list[str], tmp_path_factory: Any) -> Path:
    return demo_vocabulary.train(training_texts, tmp_path_factory.mktemp("vocabulary"), vocab_size=2048)


@pytest.fixture(scope="session")
def sp(model_path: Path) -> Any:
    """SentencePiece itself, with nothing of ours around it."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(model_path))


@pytest.fixture(scope="session")
def shared_slow(model_path: Path) -> GemmaTokenizer:
    """For tests that only read; use `slow` where settings change."""
    return GemmaTokenizer(model_path)


@pytest.fixture(scope="session")
def shared_fast(model_path: Path) -> GemmaTokenizerFast:
    return GemmaTokenizerFast(model_path)


@pytest.fixture
def slow(model_path: Path) -> GemmaTokenizer:
    return GemmaTokenizer(model_path)


@pytest.fixture
def fast(model_path: Path) -> GemmaTokenizerFast:
    return GemmaTokenizerFast(model_path)


@pytest.fixture(params=["slow", "fast"])
def either(request: Any) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["shared_slow", "shared_fast"])
def both(request: Any) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def saved(shared_fast: GemmaTokenizerFast, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    shared_fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(saved: Path) -> Any:
    """transformers' GemmaTokenizer, loaded from what we saved."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Over a million characters in chunks: code, many scripts, emoji, runs, control characters, random Unicode."""
    rng = random.Random(7)
    code = "".join(stdlib("unittest.mock", "inspect", "tarfile", "zipfile", "subprocess", "email.message", "datetime"))
    ranges = [(0x20, 0x7E), (0x80, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F)]
    ranges += [(0x2000, 0x27BF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]
    ranges += [(0, 0x1F), (0xE000, 0x10FFFF)]

    def wild() -> str:
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 30)))

    def runs() -> str:
        return rng.choice([" ", "\n", "\t", "\r\n", "-", "=", "a", "ab", "aba", ".", "\u3000", "▁"]) * rng.randint(
            1, 70
        )

    noise = ["".join(rng.choice([wild, runs])() for _ in range(200)) for _ in range(80)]
    pieces = [code[i : i + 4000] for i in range(0, len(code), 4000)] + noise + [SAMPLE] * 60
    assert sum(map(len, pieces)) > 1_000_000
    return pieces
