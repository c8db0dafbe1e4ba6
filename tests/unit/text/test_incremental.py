"""Streamed text is never taken back, and adds up to what decode gives."""

from __future__ import annotations

import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

few = st.one_of(st.integers(0, 2047), st.integers(217, 472), st.sampled_from([2, 106, 107, 139, 443, 376, 362]))


@settings(max_examples=400, deadline=None)
@given(st.lists(few, max_size=60), st.booleans(), st.data())
def test_pieces_add_up_to_decode(shared_slow: Any, shared_fast: Any, ids: list[int], skip: bool, data: Any) -> None:
    for tokenizer in (shared_slow, shared_fast):
        decoder = tokenizer.incremental_decoder(skip_special_tokens=skip)
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        shown, left = "", ids
        while left:
            size = data.draw(st.integers(1, 4))
            shown += decoder.push(left[:size])
            left = left[size:]
            assert whole.startswith(shown), "what was shown is final"
        assert shown + decoder.finish() == whole


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_no_half_character_is_shown(shared_fast: Any, text: str) -> None:
    decoder = shared_fast.incremental_decoder()
    shown = [decoder.push(index) for index in shared_fast.encode(text, add_special_tokens=False)]
    assert "".join(shown) + decoder.finish() == text.replace("▁", " ")
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in shown)


def test_special_tokens_are_shown_or_skipped(both: Any) -> None:
    ids = both("a<end_of_turn>🙂").input_ids
    for skip, expected in ((True, "a🙂"), (False, "<bos>a<end_of_turn>🙂")):
        decoder = both.incremental_decoder(skip_special_tokens=skip)
        assert decoder.push(ids) + decoder.finish() == expected


def test_tensors_can_be_pushed(both: Any) -> None:
    decoder = both.incremental_decoder()
    ids = both("hello 🙂", return_tensors="pt").input_ids[0]
    assert "".join([*(decoder.push(index) for index in ids), decoder.finish()]) == "<bos>hello 🙂"


def test_a_long_stream_costs_a_constant_per_token(shared_fast: Any) -> None:
    ids = shared_fast.encode("Some words, and 🙂 then more. " * 8000)
    decoder = shared_fast.incremental_decoder()
    start = time.process_time()
    text = "".join([decoder.push(index) for index in ids]) + decoder.finish()
    assert text == shared_fast.decode(ids)
    assert time.process_time() - start < 20, "quadratic work would take minutes"
