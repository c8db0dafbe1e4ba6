"""From generate()'s arguments to where decoding starts: ids and mask, checked and padded to one of a few lengths.

On the host, in numpy: a jax operation of its own would compile for every length.
Axis letters: B batch, P prompt positions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, TokenOutOfRange
from gemmakit.generation import GenerationConfig

SHORTEST = 16


@dataclass
class Prompt:
    """ids, mask: (B, P), as given. new: how many tokens may follow."""

    ids: Any
    mask: Any
    new: int

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 and mask bool, (B, bucket(P)), padded on the left."""
        width = bucket(self.ids.shape[1]) - self.ids.shape[1]
        around = ((0, 0), (width, 0))
        return np.pad(self.ids, around).astype(np.int32), np.pad(self.mask, around)


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is not below `length`: at most half as much again."""
    size = SHORTEST
    while size < length:
        size *= 2
    middle = size // 4 * 3
    return middle if middle >= max(length, SHORTEST) else size


def prepare(model: GemmaConfig, config: GenerationConfig, ids: Any, mask: Any) -> Prompt:
    """Raises InputError, TokenOutOfRange, PromptTooLong."""
    ids = _ids(model, config, ids)
    mask = _mask(config, ids, mask)
    _check_bos(config, ids, mask)
    new, _ = config.new_tokens(model.max_position_embeddings, ids.shape[1], int(mask.sum(-1).max()))
    return Prompt(ids, mask, new)


def traced(model: GemmaConfig, config: GenerationConfig, ids: Any, mask: Any) -> Prompt:
    """The same inside a caller's jit: what depends on values cannot be checked."""
    import jax.numpy as jnp

    mask = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    new, _ = config.new_tokens(model.max_position_embeddings, ids.shape[1], ids.shape[1])
    return Prompt(ids.astype(jnp.int32), mask, new)


def _ids(model: GemmaConfig, config: GenerationConfig, ids: Any) -> np.ndarray:
    ids = np.zeros((1, 0), np.int32) if ids is None else np.asarray(ids)
    if ids.size == 0:
        if config.bos_token_id is None or config.bos_token_id < 0:
            raise InputError("there is no prompt and no bos_token_id to start from: give input_ids.")
        return np.full((ids.shape[0] if ids.ndim == 2 else 1, 1), config.bos_token_id, np.int32)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"input_ids has shape {ids.shape} and dtype {ids.dtype}; give whole numbers (B, P).")
    low, high, size = int(ids.min()), int(ids.max()), model.vocab_size
    if low < 0 or high >= size:
        raise TokenOutOfRange(
            f"token id {low if low < 0 else high} is outside the vocabulary of {size} ids (0 to {size - 1}): "
            "was the prompt encoded with another model's tokenizer?"
        )
    return ids


def _mask(config: GenerationConfig, ids: np.ndarray, mask: Any) -> np.ndarray:
    """bool (B, P), from the caller or, where that is safe, from the pad token."""
    mask = _inferred(config, ids) if mask is None else np.asarray(mask)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has shape {mask.shape}; it must be {ids.shape}, like input_ids.")
    mask = mask.astype(bool)
    for row in np.flatnonzero(~mask.any(-1))[:1]:
        raise InputError(f"row {row} of the batch is all padding: give it at least the <bos> token.")
    for row in np.flatnonzero(~mask[:, -1])[:1]:
        raise InputError(
            f"row {row} is padded on the right, where its new tokens would come: pad on the left "
            '(tokenizer.padding_side = "left").'
        )
    return mask


def _inferred(config: GenerationConfig, ids: np.ndarray) -> np.ndarray:
    """Pad tokens hide when they form a run at the left of a row and nothing else."""
    pad = config.pad_token_id
    whole = np.ones(ids.shape, bool)
    if pad is None or pad in config.eos_token_ids:
        return whole
    is_pad = ids == pad
    if (is_pad[:, 1:] & ~is_pad[:, :-1]).any():
        warnings.warn(
            f"the prompt holds the pad token ({pad}) after other tokens and there is no attention_mask: it is taken as "
            "an ordinary token. Pass attention_mask if it is padding.",
            stacklevel=5,
        )
        return whole
    return ~is_pad


def _check_bos(config: GenerationConfig, ids: np.ndarray, mask: np.ndarray) -> None:
    """Gemma was trained with exactly one <bos> in front; without it, or with two, its text is much worse."""
    bos = config.bos_token_id
    if bos is None:
        return
    first, rows = mask.argmax(-1), np.arange(len(ids))
    second = np.minimum(first + 1, ids.shape[1] - 1)
    if (ids[rows, first] != bos).any():
        warnings.warn("a prompt does not begin with <bos>: Gemma's text is much worse without it.", stacklevel=4)
    elif ((ids[rows, second] == bos) & (second > first)).any():
        warnings.warn("a prompt begins with two <bos> tokens: Gemma was trained with one.", stacklevel=4)
