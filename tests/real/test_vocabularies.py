"""The vocabularies that Google trained: ids, places and text are those of the tokenizers package and SentencePiece."""

from __future__ import annotations

import inspect
import random
import re
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gemmakit import GemmaTokenizer, GemmaTokenizerFast
from gemmakit.errors import TemplateError
from gemmakit.hub import models_folder
from gemmakit.text.gguf import model_of, vocabulary_of

NAMES = ("gemma1-vocabulary", "gemma3-vocabulary")
HELD_OUT = Path(__file__).parents[2] / "benchmarks/data/held_out.txt"
SCRIPTS = [(0x20, 0x7E), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F)]
SCRIPTS += [(0x1100, 0x11FF), (0x2000, 0x27BF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]
SCRIPTS += [(0xFE00, 0xFEFF), (0x1F300, 0x1FAFF), (0, 0x1F), (0x7F, 0x9F), (0xE000, 0xF8FF), (0x10000, 0x10FFFF)]


@pytest.fixture(scope="module", params=NAMES)
def folder(request: Any) -> Path:
    found = models_folder() / request.param
    if not (found / "tokenizer.json").exists():
        pytest.skip(f"{found} holds no tokenizer.json: `make real` brings it (GEMMAKIT_REAL says where to)")
    return found


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def fast(folder: Path) -> GemmaTokenizerFast:
    return GemmaTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def slow(fast: GemmaTokenizerFast) -> GemmaTokenizer:
    """SentencePiece, with the model that the pieces and the order of the merges imply, by way of what a GGUF holds."""
    return GemmaTokenizer(model_of(vocabulary_of(fast)))


@pytest.fixture(scope="module")
def texts(oracle: Any) -> list[str]:
    """Over a million characters: prose, code, scripts, emoji, runs, control characters, added tokens in the text."""
    rng = random.Random(14)
    added = [token.content for token in oracle.get_added_tokens_decoder().values()]

    def wild() -> str:
        low, high = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 30)))

    def run() -> str:
        return rng.choice([" ", "\n", "\t", "\r\n", "-", "=", "ab", "\u3000", "▁", "\0", "🙂"]) * rng.randint(1, 70)

    def token() -> str:
        return rng.choice(["", " "]) + rng.choice(added) + rng.choice(["", " ", "x", "\n"])

    def broken() -> str:
        text = rng.choice(added)
        return text[: rng.randint(1, len(text))]

    noise = ["".join(rng.choice([wild, run, token, broken])() for _ in range(150)) for _ in range(200)]
    source = HELD_OUT.read_text(encoding="utf-8") + "".join(map(inspect.getsource, (tarfile, zipfile, inspect, random)))
    found = [source[i : i + 3000] for i in range(0, len(source), 3000)] + noise
    assert sum(map(len, found)) > 1_000_000
    return found


def test_ids_and_places_are_those_of_the_tokenizers_package(
    fast: GemmaTokenizerFast, oracle: Any, texts: list[str]
) -> None:
    ours = fast(texts, return_offsets_mapping=True, add_special_tokens=False)
    theirs = oracle.encode_batch(texts, add_special_tokens=False)
    for ids, places, expected in zip(ours.input_ids, ours.offset_mapping, theirs, strict=True):
        assert ids == expected.ids
        assert places == expected.offsets


def test_ids_are_those_of_sentencepiece(fast: GemmaTokenizerFast, slow: GemmaTokenizer, texts: list[str]) -> None:
    """But for what the two files say otherwise: runs of U+2581 are pieces of 2 to 31, which tokenizer.json looks for
    before spaces become U+2581 and SentencePiece after.
    """
    for text in texts:
        text = re.sub(" {32,}", " " * 31, text.replace("▁", "_"))
        assert slow(text, add_special_tokens=False).input_ids == fast(text, add_special_tokens=False).input_ids
    assert [len(token) for token in slow.tokenize(" " * 70)] == [31, 31, 8]


def test_a_gguf_gives_the_same_ids(folder: Path, fast: GemmaTokenizerFast, texts: list[str]) -> None:
    """Google's pieces and scores as llama.cpp's converter wrote them; what the two files say otherwise stands above."""
    path = models_folder() / "gemma3-270m.gguf"
    if folder.name != "gemma3-vocabulary" or not path.exists():
        pytest.skip(f"{path} is Gemma 3's: `make real` brings it")
    slow = GemmaTokenizer.from_pretrained(path)
    assert slow.end_of_turn_id == 106
    for text in texts:
        text = re.sub(" {32,}", " " * 31, text.replace("▁", "_").replace("<image_soft_token>", ""))
        assert slow(text, add_special_tokens=False).input_ids == fast(text, add_special_tokens=False).input_ids


def test_text_comes_back(fast: GemmaTokenizerFast, slow: GemmaTokenizer, oracle: Any, texts: list[str]) -> None:
    for text in texts:
        ids = fast.encode(text, add_special_tokens=False)
        assert fast.decode(ids) == slow.decode(ids) == text.replace("▁", " ")
        assert fast.decode(ids) == oracle.decode(ids, skip_special_tokens=False)


def test_any_ids_decode_as_the_tokenizers_package_has_it(fast: GemmaTokenizerFast, oracle: Any) -> None:
    """Bytes that are no text included; streamed as well as at once."""
    rng = random.Random(15)
    bytes_ = [fast.convert_tokens_to_ids(f"<0x{value:02X}>") for value in range(256) if value != 9]
    for _ in range(500):
        ids = [rng.choice(bytes_) if rng.random() < 0.3 else rng.randrange(fast.vocab_size) for _ in range(60)]
        text = oracle.decode(ids, skip_special_tokens=False)
        decoder = fast.incremental_decoder()
        assert fast.decode(ids) == "".join(map(decoder.push, ids)) + decoder.finish() == text


def test_saved_and_loaded_it_is_the_same(fast: GemmaTokenizerFast, texts: list[str], tmp_path: Path) -> None:
    fast.save_pretrained(tmp_path)
    again = GemmaTokenizerFast.from_pretrained(tmp_path)
    assert again(texts[:50]).input_ids == fast(texts[:50]).input_ids
    assert again.added_tokens_decoder == fast.added_tokens_decoder


def test_the_vocabulary_is_loaded_in_seconds(folder: Path) -> None:
    start = time.process_time()
    GemmaTokenizerFast.from_pretrained(folder)
    assert time.process_time() - start < 20, "adding 6,415 tokens one by one takes minutes"


def test_turns_and_their_ends(fast: GemmaTokenizerFast, slow: GemmaTokenizer) -> None:
    gemma3 = len(fast) > 260_000
    turn, end = (105, 106) if gemma3 else (106, 107)
    assert fast.convert_tokens_to_ids("<unused0>") == (6 if gemma3 else 7)
    for tokenizer in (fast, slow):
        assert tokenizer.end_of_turn_id == end
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True).input_ids
        assert [index for index in ids if index in (2, turn, end)] == [2, turn, end, turn]
        assert tokenizer.decode(ids) == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"


def test_a_system_message(fast: GemmaTokenizerFast) -> None:
    """Gemma 3's template folds it into the first user turn; that of Gemma 1 and 2 has no words for it but a refusal."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = fast.apply_chat_template(chat, tokenize=False)
    assert text == "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
    if "System role not supported" in fast.get_chat_template():
        with pytest.raises(TemplateError, match="System role not supported"):
            fast.apply_chat_template(chat, system="refuse")
    else:
        assert fast.apply_chat_template(chat, tokenize=False, system="refuse") == text


def test_a_list_of_text_parts_is_the_string_of_them(fast: GemmaTokenizerFast) -> None:
    """With the checkpoint's own template: Gemma 1's writes a list into the prompt as Python shows it."""
    texts = ["Hi", " two\nlines ", "", "{{ x }} 🙂"]
    plain = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]
    listed = [{**said, "content": [{"type": "text", "text": said["content"]}]} for said in plain]
    assert fast.apply_chat_template(listed).input_ids == fast.apply_chat_template(plain).input_ids
    with pytest.raises(TemplateError, match=r"'image'.*text only"):
        fast.apply_chat_template([{"role": "user", "content": [{"type": "image", "url": "x.png"}]}])


def test_a_user_cannot_forge_a_token(fast: GemmaTokenizerFast, slow: GemmaTokenizer) -> None:
    structural = fast._engine.added.structural
    rng = random.Random(16)
    for tokenizer in (fast, slow):
        empty = tokenizer.apply_chat_template([{"role": "user", "content": "x"}]).input_ids
        for _ in range(20):
            text = "".join(rng.choice(structural)[rng.randint(0, 1) :] for _ in range(20))
            ids = tokenizer.apply_chat_template([{"role": "user", "content": f"x{text}x"}]).input_ids
            known = set(map(tokenizer.convert_tokens_to_ids, structural))
            assert [i for i in ids if i in known] == [i for i in empty if i in known]
            assert tokenizer.decode(ids) == f"<bos><start_of_turn>user\nx{text}x<end_of_turn>\n"
