"""Which tokens of a chat the assistant says: what a model learns, found without a template made for training.

A turn is what the template writes after the prompt of that turn, as a server would send it: up to the token that ends
the turn. So the ids before it are to the last one those that the model is asked with. Some templates open a turn with
more than they write of it afterwards, as with an empty thought: such a turn begins where the two part. Some write what
a tool gave back into the turn that called it: such a turn is said up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gemmakit.errors import TemplateError

Span = tuple[int, int]
SPEAKERS = ("assistant", "model")


def assistant_spans(
    render: Callable[[list[dict[str, Any]], bool], str], chat: list[dict[str, Any]], text: str, ends: Sequence[str]
) -> list[Span]:
    """Where in `text`, the chat as the template writes it, each turn of the assistant begins and ends.

    A message of weight 0 is none: it may be written otherwise than it was said, as calls whose thoughts are dropped.

    render: messages, and whether to open the assistant's turn after them, to text. ends: tokens that end a turn.
    Raises TemplateError where the template writes a turn otherwise once the chat has gone on.
    """
    found = list[Span]()
    for index, message in enumerate(chat):
        if message["role"] not in SPEAKERS or message.get("weight") == 0:
            continue
        if index == 0:
            raise TemplateError("message 0 is the assistant's: a user must speak first, or the turn has no prompt.")
        prompt = render(chat[:index], True)
        upto = text if index == len(chat) - 1 else render(chat[: index + 1], False)
        same = _common_start(upto, text)
        start = len(_common_start(prompt, same))
        end = next((place for place in _ends(upto, start, ends) if place <= len(same)), None)
        if (start < len(prompt) and start <= len(render(chat[:index], False))) or end is None:
            raise TemplateError(
                f"the chat template writes messages up to {index} otherwise once the chat goes on, so that the "
                "assistant would learn to answer what it is never asked: give a row of its own to each answer."
            )
        found.append((start, end))
    return found


def _common_start(one: str, other: str) -> str:
    return one[: next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))]


def _ends(text: str, start: int, ends: Sequence[str]) -> list[int]:
    """Behind the last token that ends a turn, then before it; without one, behind the last character but blanks."""
    last, token = max(((text.rfind(token, start), token) for token in ends), default=(-1, ""))
    return [max(start, len(text.rstrip()))] if last < 0 else [last + len(token), last]


def assistant_mask(tokenizer: Any, ids: Sequence[int], spans: Sequence[Span], text: str, cut: str) -> list[int]:
    """1 for each of `ids` that lies in a span, 0 for the others.

    text: what was encoded, in pieces that `cut` parts. A token that reaches over the start of a span belongs to it.
    """
    mask = [0] * len(ids)
    for span in spans:
        start, stop = (_tokens_before(tokenizer, ids, text[:place], cut) for place in span)
        mask[start:stop] = [1] * (stop - start)
    return mask


def _tokens_before(tokenizer: Any, ids: Sequence[int], text: str, cut: str) -> int:
    before = tokenizer._encode_pieces(text.split(cut)).ids
    return next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
