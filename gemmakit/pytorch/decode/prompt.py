"""From generate()'s arguments to where decoding starts: ids, visibility, cache, and room, all checked.

Axis letters: B batch, P prompt positions, D hidden.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, PromptTooLong, TokenOutOfRange
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.cache import Cache, DynamicCache
from gemmakit.pytorch.cache.kinds import new_cache


@dataclass
class Prompt:
    """Where decoding starts.

    ids: (B, P) tokens that processors see and that begin the result. embeds: (B, P', D) to run instead of ids, or None.
    mask: bool (B, past + P) over everything the cache will hold, or None when nothing is padding.
    cache: what the keys go to; None recomputes everything each step. past: tokens of ids it holds already.
    given: whether the cache is the caller's, who sees it afterwards.
    """

    ids: Tensor
    embeds: Tensor | None
    mask: Tensor | None
    cache: Cache | None
    past: int
    given: bool = False

    @property
    def padding(self) -> Tensor | None:
        """bool (B, P), True where ids are padding; None when none are."""
        return None if self.mask is None else ~self.mask[:, self.mask.shape[1] - self.ids.shape[1] :]


def prepare(
    model: Any,
    config: GenerationConfig,
    ids: Tensor | None,
    attention_mask: Tensor | None,
    embeds: Tensor | None,
    cache: Cache | None,
    spare: int = 0,
) -> tuple[Prompt, int]:
    """The prompt, and how many new tokens may follow. spare: places of the cache for tokens that are only tried.

    Raises InputError, TokenOutOfRange, PromptTooLong.
    """
    if isinstance(cache, tuple | list):
        cache = DynamicCache.from_legacy_cache(cache)
    ids = _ids(model, ids, embeds, config)
    mask = _mask(ids, attention_mask, embeds, cache, config)
    new = _new_tokens(model.config, config, ids, embeds, mask, cache, spare)
    held = 0 if cache is None else cache.get_seq_length()
    full = mask is None or mask.shape[1] <= ids.shape[1]  # the ids include what the cache holds
    prompt = Prompt(
        ids=ids,
        embeds=embeds,
        mask=mask if mask is not None and not bool(mask.all()) else None,
        cache=cache if cache is not None else _new_cache(model, config, ids, embeds, new + spare),
        past=held if full and held < ids.shape[1] else 0,
        given=cache is not None,
    )
    return prompt, new


def _ids(model: Any, ids: Tensor | None, embeds: Tensor | None, config: GenerationConfig) -> Tensor:
    """The prompt's ids (B, P), checked; P is 0 where embeddings stand alone."""
    if embeds is not None:
        ids = torch.empty((embeds.shape[0], 0), dtype=torch.long, device=embeds.device) if ids is None else ids
        if ids.shape[1] not in (0, embeds.shape[1]):
            raise InputError(f"input_ids has {ids.shape[1]} positions and inputs_embeds {embeds.shape[1]}.")
        return ids
    if ids is None or ids.shape[-1] == 0:
        if config.bos_token_id is None or config.bos_token_id < 0:
            raise InputError("there is no prompt and no bos_token_id to start from: give input_ids.")
        rows = 1 if ids is None or ids.dim() < 2 else ids.shape[0]
        return torch.full((rows, 1), config.bos_token_id, dtype=torch.long, device=model.device)
    if ids.dim() != 2 or ids.is_floating_point() or not ids.shape[0]:
        raise InputError(f"input_ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; give whole numbers (B, P).")
    size = model.config.vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise TokenOutOfRange(
            f"token id {low if low < 0 else high} is outside the vocabulary of {size} ids (0 to {size - 1}): "
            "was the prompt encoded with another model's tokenizer?"
        )
    return ids.to(model.device, torch.long)


def _mask(
    ids: Tensor, mask: Tensor | None, embeds: Tensor | None, cache: Cache | None, config: GenerationConfig
) -> Tensor | None:
    """The visibility of prompt tokens as bool, from the caller or, where that is safe, from the pad token."""
    P = ids.shape[1] if embeds is None else embeds.shape[1]
    if mask is None:
        full = cache is None or cache.get_seq_length() < ids.shape[1]  # else the ids come after what the cache holds
        mask = _inferred(ids, config) if embeds is None and full else None
    if mask is None:
        _check_bos(ids, None, config, cache)
        return None
    if mask.dim() != 2 or mask.shape[0] != ids.shape[0] or mask.shape[1] < P:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be ({ids.shape[0]}, {P}), or wider by what the "
            "cache holds."
        )
    mask = mask.to(ids.device, torch.bool)
    empty = (~mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"row {empty[0]} of the batch is all padding: give it at least the <bos> token.")
    if not bool(mask[:, -1].all()):
        row = int((~mask[:, -1]).nonzero()[0])
        raise InputError(
            f"row {row} is padded on the right, where its new tokens would come: pad on the left "
            '(tokenizer.padding_side = "left").'
        )
    _check_bos(ids, mask, config, cache)
    return mask


def _inferred(ids: Tensor, config: GenerationConfig) -> Tensor | None:
    """A mask when pad tokens form a run at the left of a row and nothing else; None when there are none."""
    pad = config.pad_token_id
    if pad is None or pad in config.eos_token_ids:
        return None
    is_pad = ids == pad
    if not bool(is_pad.any()):
        return None
    if bool(is_pad.all(-1).any()):
        row = int(is_pad.all(-1).nonzero()[0])
        raise InputError(f"row {row} of the batch is all padding: give it at least the <bos> token.")
    if bool((is_pad[:, 1:] & ~is_pad[:, :-1]).any()):
        warnings.warn(
            f"the prompt holds the pad token ({pad}) after other tokens and there is no attention_mask: it is taken as "
            "an ordinary token. Pass attention_mask if it is padding.",
            stacklevel=7,
        )
        return None
    return ~is_pad


def _check_bos(ids: Tensor, mask: Tensor | None, config: GenerationConfig, cache: Cache | None) -> None:
    """Gemma was trained with exactly one <bos> in front; without it, or with two, its text is much worse."""
    bos = config.bos_token_id
    if bos is None or not ids.shape[1] or (cache is not None and cache.get_seq_length()):
        return
    first = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device) if mask is None else mask.int().argmax(-1)
    if mask is not None and mask.shape[1] != ids.shape[1]:
        return
    heads = ids.gather(1, first[:, None]).flatten()
    seconds = ids.gather(1, (first[:, None] + 1).clamp_max(ids.shape[1] - 1)).flatten()
    if not bool((heads == bos).all()):
        warnings.warn("a prompt does not begin with <bos>: Gemma's text is much worse without it.", stacklevel=7)
    elif bool(((seconds == bos) & (first < ids.shape[1] - 1)).any()):
        warnings.warn("a prompt begins with two <bos> tokens: Gemma was trained with one.", stacklevel=7)


def _new_tokens(
    model: GemmaConfig,
    config: GenerationConfig,
    ids: Tensor,
    embeds: Tensor | None,
    mask: Tensor | None,
    cache: Cache | None,
    spare: int,
) -> int:
    """How many tokens may come. Raises PromptTooLong when they do not fit."""
    prompt = ids.shape[1] if embeds is None else embeds.shape[1]
    if mask is not None:
        prompt = max(prompt, mask.shape[1])
    elif cache is not None and cache.get_seq_length() >= ids.shape[1]:
        prompt += cache.get_seq_length()
    longest = prompt if mask is None else int(mask.sum(-1).max())
    new, asked = config.new_tokens(model.max_position_embeddings, prompt, longest)
    if cache is not None and cache.max_cache_len is not None and prompt + new - 1 + spare > cache.max_cache_len:
        raise PromptTooLong(
            f"prompt has {prompt} tokens and {asked}, but the cache holds {cache.max_cache_len}. "
            f"Shorten the prompt or make the cache with max_cache_len={prompt + new + spare}."
        )
    return new


def _new_cache(model: Any, config: GenerationConfig, ids: Tensor, embeds: Tensor | None, new: int) -> Cache | None:
    # Embeddings cannot be run again from ids, so they always need a cache.
    if not config.use_cache and embeds is None:
        return None
    length = (ids.shape[1] if embeds is None else embeds.shape[1]) + new
    return new_cache(
        config.cache_implementation, model.config, max(length, config.max_cache_len or 0), config.cache_config
    )
