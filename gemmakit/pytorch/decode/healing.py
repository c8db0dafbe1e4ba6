"""Token healing: the prompt's last token is taken back and grown again.

A prompt that ends inside a word, or with a space, ends in a token the model never saw there: "http:" makes "//" less
likely, because in training "://" was one token. The last token is replaced by the likeliest one that begins with its
bytes, so the text of the prompt stays and only the border moves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.pytorch.decode.processors import FORBIDDEN
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.token_bytes import Tokenizer, token_table

# The token that stood there needs no better reason to stay: "http" should not become "https" on a near tie.
_FAVOUR = 1.0
_sorted: WeakKeyDictionary[Any, tuple[int, list[tuple[bytes, int]]]] = WeakKeyDictionary()


def heal(model: CausalLM, prompt: Prompt, tokenizer: Tokenizer | None) -> None:
    """Grow the last token of each row of the prompt again, in place. Costs one more pass over the prompt.

    A token without longer forms, a special one, or one with nothing before it stays. Raises InputError without a
    tokenizer, without ids, or when the cache already holds a part of the text that is not in the ids.
    """
    if tokenizer is None:
        raise InputError("token_healing compares texts: pass the tokenizer too, generate(..., tokenizer=...).")
    if prompt.embeds is not None:
        raise InputError("token_healing replaces the prompt's last token, and inputs_embeds has no tokens.")
    if prompt.mask is not None and prompt.mask.shape[1] != prompt.ids.shape[1]:
        raise InputError("token_healing needs all ids of the text, those that the cache holds too.")
    if prompt.cache is not None and int(prompt.cache.get_seq_length()) >= prompt.ids.shape[1]:
        raise InputError("token_healing replaces the prompt's last token, and past_key_values holds it already.")
    vocabulary = model.config.vocab_size
    table, special = token_table(tokenizer, vocabulary)
    tails = prompt.ids[:, -1].tolist()
    choices = [[] if t in special else _longer(tokenizer, table, special, t) for t in tails]
    if prompt.ids.shape[1] < 2 or not any(choices):
        return
    scores = _before_last(model, prompt)
    ids = prompt.ids.clone()
    for row, (tail, longer) in enumerate(zip(tails, choices, strict=True)):
        alone = prompt.mask is not None and not bool(prompt.mask[row, :-1].any())
        if longer and not alone:
            ids[row, -1] = _best(scores[row], tail, longer)
    prompt.ids = ids


def _best(scores: Tensor, tail: int, longer: Sequence[int]) -> Tensor:
    """scores: (V,) -> the likeliest of the tail and its longer forms, ()."""
    kept = torch.full_like(scores, FORBIDDEN)
    candidates = torch.tensor([tail, *longer], device=scores.device)
    kept[candidates] = scores[candidates]
    kept[tail] += _FAVOUR
    return kept.argmax()


def _before_last(model: CausalLM, prompt: Prompt) -> Tensor:
    """(B, V) float32: what the model expects in the place of the last token."""
    mask = None if prompt.mask is None else prompt.mask[:, :-1]
    out = model(
        input_ids=prompt.ids[:, :-1],
        attention_mask=mask,
        position_ids=None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0),
        use_cache=False,
        return_dict=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1].float()


def _longer(tokenizer: Tokenizer, table: Sequence[bytes], special: frozenset[int], tail: int) -> list[int]:
    """The other tokens whose bytes begin with the tail's."""
    words = _sorted.get(tokenizer)
    if words is None or words[0] != id(table):
        listed = sorted((word, index) for index, word in enumerate(table) if word and index not in special)
        words = _sorted[tokenizer] = id(table), listed
    beginning = table[tail]
    start = bisect_left(words[1], (beginning, -1))
    found = []
    for word, index in words[1][start:]:
        if not word.startswith(beginning):
            break
        if index != tail and len(word) > len(beginning):
            found.append(index)
    return found
