"""Text as it comes: all of it, nothing twice, nothing taken back, and an end in every case."""

from __future__ import annotations

import asyncio
import io
import queue
import random
import threading
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from tiny_checkpoint import write_vocabulary

from gemmakit import AsyncTextIteratorStreamer, GemmaTokenizerFast, TextIteratorStreamer, TextStreamer
from gemmakit.errors import InputError

TEXTS = [
    "def add(a, b):\n    return a + b",
    "naïve café 🙂👩‍👩‍👧 żółć",
    "a , b . c ! it 's I 'm we 've n't ' x ' ? .",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> GemmaTokenizerFast:
    return GemmaTokenizerFast(vocab_file=write_vocabulary(tmp_path_factory.mktemp("vocabulary")))


class Kept(TextStreamer):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.parts: list[str] = []
        self.ends = 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        self.ends += stream_end


def follow(streamer: TextStreamer, prompt: list[int], new: list[int]) -> None:
    streamer.put(torch.tensor([prompt]))
    for token in new:
        streamer.put(torch.tensor([token]))
    streamer.end()


def random_ids(tokenizer: GemmaTokenizerFast, seed: int) -> list[int]:
    rng = random.Random(seed)
    smiley = tokenizer("🙂é", add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    while len(ids) < 40:
        ids += rng.choice([[rng.randrange(len(tokenizer))], smiley, [rng.randrange(217, 473)]])
    return ids


OPTIONS = [
    {},
    {"skip_special_tokens": True},
    {"clean_up_tokenization_spaces": True},
    {"spaces_between_special_tokens": True},
    {"skip_special_tokens": True, "clean_up_tokenization_spaces": True, "spaces_between_special_tokens": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_stream_is_the_decoded_text(tokenizer, options):
    rows = [tokenizer(text)["input_ids"] for text in TEXTS] + [random_ids(tokenizer, seed) for seed in range(20)]
    for row in rows:
        split = len(row) // 3
        whole, rest = Kept(tokenizer, **options), Kept(tokenizer, skip_prompt=True, **options)
        follow(whole, row[:split], row[split:])
        follow(rest, row[:split], row[split:])
        assert "".join(whole.parts) == tokenizer.decode(row, **options)
        assert "".join(rest.parts) == tokenizer.decode(row[split:], **options)
        assert whole.ends == rest.ends == 1


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_text_comes_with_its_token(tokenizer, options):
    row = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    kept = Kept(tokenizer, skip_prompt=True, **options)
    kept.put(torch.tensor([[2]]))
    for count, token in enumerate(row, 1):
        kept.put(torch.tensor([token]))
        assert "".join(kept.parts) == tokenizer.decode(row[:count])


def test_a_character_is_never_shown_in_halves(tokenizer):
    row = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert len(row) == 4
    kept = Kept(tokenizer)
    follow(kept, [2], [*row, 5])
    assert all("\ufffd" not in part for part in kept.parts)


def test_a_foreign_tokenizer_needs_only_decode(tokenizer):
    class Foreign:
        def decode(self, ids: Any, **kwargs: Any) -> str:
            return tokenizer.decode(ids, **kwargs)

    row = tokenizer("naïve 🙂 text")["input_ids"]
    kept = Kept(Foreign(), skip_special_tokens=True)
    follow(kept, row[:2], row[2:])
    assert "".join(kept.parts) == "naïve 🙂 text"


def test_a_streamer_can_follow_a_second_generation(tokenizer):
    kept = Kept(tokenizer, skip_prompt=True)
    row = tokenizer("x = 1")["input_ids"]
    follow(kept, row, row)
    follow(kept, row, row)
    assert "".join(kept.parts) == tokenizer.decode(row) * 2
    assert kept.ends == 2


def test_printing_ends_with_one_line_end(tokenizer):
    out = io.StringIO()
    with redirect_stdout(out):
        follow(TextStreamer(tokenizer, skip_special_tokens=True), *2 * [tokenizer("x = 1")["input_ids"]])
    assert out.getvalue() == "x = 1x = 1\n"


def test_a_lone_first_token_after_embeddings_is_not_taken_for_the_prompt(tokenizer):
    kept = Kept(tokenizer, skip_prompt=True)
    kept.put(torch.tensor([500]))
    kept.end()
    assert "".join(kept.parts) == tokenizer.decode([500])


def test_wrong_arguments_are_refused_at_once(tokenizer):
    with pytest.raises(TypeError):
        TextStreamer(tokenizer, skip_specials=True)
    with pytest.raises(InputError, match="batch has 2"):
        TextStreamer(tokenizer).put(torch.tensor([[1], [2]]))


def test_an_iterator_ends_with_the_generation_also_when_it_fails(tokenizer):
    row = tokenizer("def add(a, b)")["input_ids"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)

    def generate(fail: bool) -> None:
        try:
            streamer.put(torch.tensor([row]))
            for token in row[1:]:
                streamer.put(torch.tensor([token]))
            if fail:
                return  # what an exception in the loop comes to: its finally
        finally:
            streamer.end()

    for fail in (False, True):
        thread = threading.Thread(target=generate, args=(fail,))
        thread.start()
        assert "".join(streamer) == "def add(a, b)"
        thread.join()


def test_an_iterator_gives_up_waiting_after_its_timeout(tokenizer):
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))

    async def wait() -> None:
        await AsyncTextIteratorStreamer(tokenizer, timeout=0.01).__anext__()

    with pytest.raises(TimeoutError):
        asyncio.run(wait())


def test_an_asynchronous_iterator_takes_text_from_another_thread(tokenizer):
    row = tokenizer("naïve 🙂 text")["input_ids"]

    async def collect() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10, skip_special_tokens=True)
        thread = threading.Thread(target=follow, args=(streamer, row, row))
        thread.start()
        text = "".join([part async for part in streamer])
        thread.join()
        return text

    assert asyncio.run(collect()) == "naïve 🙂 text"
