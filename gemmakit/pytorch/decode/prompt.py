"""What a call gives the model: ids or embeddings, visibility, cache and room, all checked; and the rows that run on it.

Axis letters: B prompts, R rows (prompts times their copies), P prompt positions, n tokens that are not padding,
D hidden, K kv heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, PromptTooLong, TokenOutOfRange
from gemmakit.generation import GenerationConfig
from gemmakit.outputs import CausalLMOutputWithPast
from gemmakit.pytorch.cache import Cache, counted_positions, new_cache
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.step import forward
from gemmakit.pytorch.kernels import rows_alike
from gemmakit.pytorch.masks import MIN_SEGMENT, segments_pay

# Less padding than this is run along: laying out costs a few passes over keys and values.
WORTH_PADDING = 0.1
IMPLEMENTATIONS = (None, "sdpa", "flash_attention_2")


@dataclass
class Prompt:
    """Where decoding starts.

    ids: (B, P) tokens that processors see and that begin the result. embeds: (B, P', D) to run instead of ids, or None.
    mask: bool (B, past + P) over everything the cache will hold, or None when nothing is padding.
    cache: what the keys go to; None recomputes everything each step. past: tokens of ids it holds already.
    given: whether the cache is the caller's, who sees it afterwards. positions: (B or 1, n), a caller's position_ids
    of the last n tokens, where they are others than those that count what is not padding.
    """

    ids: Tensor
    embeds: Tensor | None
    mask: Tensor | None
    cache: Cache | None
    past: int
    given: bool = False
    positions: Tensor | None = None

    @property
    def padding(self) -> Tensor | None:
        """bool (B, P), True where ids are padding; None when none are."""
        return None if self.mask is None else ~self.mask[:, self.mask.shape[1] - self.ids.shape[1] :]


def prepare(
    model: CausalLM,
    config: GenerationConfig,
    ids: Tensor | None,
    attention_mask: Tensor | None,
    embeds: Tensor | None,
    cache: Cache | None,
    spare: int = 0,
    forgets: bool = False,
    positions: Tensor | None = None,
) -> tuple[Prompt, int]:
    """The prompt, and how many new tokens may follow.

    spare: places of the cache for tokens that are only tried. forgets: whether a cache that is made here may let go of
    what windows hide. positions: (B or 1, P) position_ids of the prompt.

    Raises InputError, TokenOutOfRange, PromptTooLong.
    """
    ids = _ids(model, ids, embeds, config)
    extent = _extent(ids, embeds, attention_mask, cache)
    if attention_mask is not None and attention_mask.dim() == 2 and not extent.past:
        ids, embeds, positions, attention_mask = _padded_left(ids, embeds, positions, attention_mask, extent.width)
    mask = _mask(ids, attention_mask, extent, cache, config)
    positions = _own_positions(positions, mask, extent, cache)
    if positions is not None and mask is None:
        mask = torch.ones((len(ids), extent.total), dtype=torch.bool, device=ids.device)
    new = _new_tokens(model.config, config, extent, mask, cache, spare)
    prompt = Prompt(
        ids=ids,
        embeds=None if embeds is None else embeds[:, extent.past :],
        mask=mask,
        cache=cache if cache is not None else _new_cache(model, config, extent.width + new + spare, embeds, forgets),
        past=extent.past,
        given=cache is not None,
        positions=positions,
    )
    return prompt, new


class Extent(NamedTuple):
    """How a prompt and a cache that is given lie together, whatever form the prompt has.

    width: positions of the prompt; held: those of the cache; past: how many of the prompt's first the cache holds, all
    of its own or none of them.
    """

    width: int
    held: int
    past: int

    @property
    def total(self) -> int:
        """Positions of both."""
        return self.width + self.held - self.past


def _extent(ids: Tensor, embeds: Tensor | None, mask: Tensor | None, cache: Cache | None) -> Extent:
    """A prompt longer than the cache begins with what that holds, unless its mask covers both."""
    width = ids.shape[1] if embeds is None else embeds.shape[1]
    held = 0 if cache is None else cache.get_seq_length()
    begins = held < width and (mask is None or mask.shape[-1] == width)
    return Extent(width, held, held if begins else 0)


def _padded_left(
    ids: Tensor, embeds: Tensor | None, positions: Tensor | None, mask: Tensor, width: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The prompt with what is padding on its right, where new tokens come, on its left instead."""
    if mask.shape[0] != ids.shape[0] or mask.shape[1] < width or not width or bool(mask[:, -1].all()):
        return ids, embeds, positions, mask
    shown = torch.nn.functional.pad(mask[:, -width:] != 0, (1, 0), value=True)
    ends = (shown * torch.arange(width + 1, device=mask.device)).amax(-1, keepdim=True)
    order = (torch.arange(width, device=mask.device) + ends) % width
    warnings.warn(
        "the prompts are padded on the right, where their new tokens come: the padding is moved to the left, also in "
        'the result. Pad there to begin with: tokenizer.padding_side = "left".',
        stacklevel=8,
    )
    moved = order.to(ids.device)
    ids = ids.gather(1, moved) if ids.shape[1] else ids
    embeds = None if embeds is None else embeds.gather(1, moved[..., None].expand_as(embeds))
    if positions is not None and positions.shape[-1] == width:
        positions = positions.expand(len(ids), width).gather(1, moved.to(positions.device))
    return ids, embeds, positions, torch.cat((mask[:, :-width], mask[:, -width:].gather(1, order)), dim=1)


def _own_positions(positions: Tensor | None, mask: Tensor | None, extent: Extent, cache: Cache | None) -> Tensor | None:
    """(B or 1, n) position_ids of the prompt's last n tokens; None where they are what would be counted."""
    if positions is None:
        return None
    if positions.dim() != 2 or positions.shape[1] not in (extent.width, extent.width - extent.past):
        raise InputError(
            f"position_ids has shape {tuple(positions.shape)}; it must be (B, {extent.width}) or (1, ...)."
        )
    new = extent.width - extent.past
    if mask is None:
        counted = torch.arange(extent.total - new, extent.total, device=positions.device)[None]
    else:
        counted = counted_positions(mask, cache)[:, -new:].to(positions.device)
    positions = positions[:, -new:]
    shown = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask[:, -new:].to(positions.device)
    return None if bool(((positions == counted) | ~shown).all()) else positions


def _ids(model: CausalLM, ids: Tensor | None, embeds: Tensor | None, config: GenerationConfig) -> Tensor:
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
    ids: Tensor, mask: Tensor | None, extent: Extent, cache: Cache | None, config: GenerationConfig
) -> Tensor | None:
    """The visibility of all tokens, bool (B, total), from the caller, the cache and, where that is safe, the pad token.

    None when nothing is padding and positions are places.
    """
    held = None if cache is None else cache.padding_mask(extent.held, len(ids))
    if mask is None:
        inferred = _inferred(ids, config) if ids.shape[1] == extent.total else None
        _check_bos(ids, inferred, config, cache)
        mask = ids.new_ones((len(ids), extent.width)) if inferred is None else inferred
        if inferred is None and held is None and not _lags(cache):
            return None
    elif mask.dim() != 2 or mask.shape[0] != ids.shape[0] or mask.shape[1] not in (extent.width, extent.total):
        both = f" or, with the {extent.held} of the cache, ({ids.shape[0]}, {extent.total})"
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be ({ids.shape[0]}, {extent.width})"
            f"{both if extent.total > extent.width else ''}."
        )
    mask = mask.to(ids.device, torch.bool)
    if held is not None or mask.shape[1] < extent.total:
        held = mask.new_ones((len(ids), extent.held)) if held is None else held.to(ids.device)
        if mask.shape[1] == extent.total:
            held = held & mask[:, : extent.held]
        mask = torch.cat((held, mask[:, mask.shape[1] - (extent.total - extent.held) :]), dim=1)
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
    return None if bool(mask.all()) and not _lags(cache) else mask


def _lags(cache: Cache | None) -> bool:
    return cache is not None and cache.lag is not None and bool(cache.lag.any())


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
    model: GemmaConfig, config: GenerationConfig, extent: Extent, mask: Tensor | None, cache: Cache | None, spare: int
) -> int:
    """How many tokens may come. Raises PromptTooLong when they do not fit."""
    prompt = extent.total
    longest = prompt if mask is None else int(mask.sum(-1).max())
    new, asked = config.new_tokens(model.max_position_embeddings, prompt, longest)
    if cache is not None and cache.max_cache_len is not None and prompt + new - 1 + spare > cache.max_cache_len:
        raise PromptTooLong(
            f"prompt has {prompt} tokens and {asked}, but the cache holds {cache.max_cache_len}. "
            f"Shorten the prompt or make the cache with max_cache_len={prompt + new + spare}."
        )
    return new


def _new_cache(
    model: CausalLM, config: GenerationConfig, length: int, embeds: Tensor | None, forgets: bool
) -> Cache | None:
    # Embeddings cannot be run again from ids, so they always need a cache.
    if not config.use_cache and embeds is None:
        return None
    length = max(length, config.max_cache_len or 0)
    return new_cache(config.cache_implementation, model.config, length, config.cache_config, forgets)


# -- the rows that run on it -------------------------------------------------------------------------------------------


class Rows:
    """A token buffer (R, total) that is filled from the left, and one way to run the model over a part of it.

    length: how many places of the buffer are tokens. offset: how many positions the cache holds before the buffer's
    first, when the prompt continues a conversation or came as embeddings. alike: pass over a few tokens so that none of
    their bits depends on how many they are.
    """

    def __init__(
        self,
        model: CausalLM,
        prompt: Prompt,
        total: int,
        pad: int,
        *,
        attentions: bool = False,
        hidden_states: bool = False,
    ):
        self.model, self.prompt, self.cache = model, prompt, prompt.cache
        self.attentions, self.hidden_states = attentions, hidden_states
        R, P = prompt.ids.shape
        self.length, self.alike = P, False
        self.device = prompt.ids.device
        self.buffer = torch.full((R, total), pad, dtype=torch.long, device=self.device)
        self.buffer[:, :P] = prompt.ids
        self.offset = 0 if prompt.mask is None else prompt.mask.shape[1] - P
        self.mask = self.positions = None
        if prompt.mask is not None:
            self.mask = torch.ones((R, prompt.mask.shape[1] + total - P), dtype=torch.bool, device=self.device)
            self.mask[:, : prompt.mask.shape[1]] = prompt.mask
            counted = counted_positions(self.mask, self.cache)
            self.positions = torch.nn.functional.pad(counted, (self.mask.shape[1] - counted.shape[1], 0))
            if prompt.positions is not None:
                own, end = prompt.positions.to(self.device), prompt.mask.shape[1]
                self.positions[:, end - own.shape[1] : end] = own
                self.positions[:, end:] = own[:, -1:] + 1 + torch.arange(total - P, device=self.device)

    @property
    def ids(self) -> Tensor:
        """(R, length): prompt and new tokens so far."""
        return self.buffer[:, : self.length]

    @property
    def total(self) -> int:
        return self.buffer.shape[1]

    def append(self, token: Tensor) -> Tensor:
        """token: (R,) -> ids (R, length) with it; NO_TOKEN is written as 0."""
        torch.clamp(token, min=0, out=self.buffer[:, self.length])
        self.length += 1
        return self.ids

    def forward(self, start: int, end: int, embeds: Tensor | None = None, keep: int = 1) -> Any:
        """Run places start..end of the buffer (or `embeds` in their place); logits of the last `keep` of them."""
        seen = end + self.offset
        count = end - start if embeds is None else embeds.shape[1]
        with rows_alike() if self.alike else nullcontext():
            return forward(
                self.model,
                None if embeds is not None else self.buffer[:, start:end],
                self.cache,
                None if self.mask is None else self.mask[:, :seen],
                None if self.positions is None else self.positions[:, seen - count : seen],
                embeds=embeds,
                keep=keep,
                attentions=self.attentions,
                hidden_states=self.hidden_states,
            )

    def prefill(self, copies: int = 1, chunk: int | None = None) -> Any:
        """Run the prompt, once; then every row becomes `copies` rows, and so does what the pass returned."""
        start, end = self.prompt.past, self.length
        if self.prompt.embeds is not None:
            return self._spread(self.forward(start, end, self.prompt.embeds), copies)
        if chunk is None and self._packs():
            assert self.mask is not None and self.positions is not None
            mask, positions = self.mask[:, :end], self.positions[:, :end]
            return self._spread(packed_prefill(self.model, self.ids, mask, positions, self.cache), copies)
        while chunk is not None and self.cache is not None and end - start > chunk:
            self.forward(start, start + chunk)
            start += chunk
        return self._spread(self.forward(start, end), copies)

    def _packs(self) -> bool:
        """Whether the prompts are whole, padded, and better run without their padding."""
        if self.mask is None or self.offset or self.prompt.past or self.attentions or self.hidden_states:
            return False
        if self.prompt.positions is not None:
            return False
        return packing_pays(self.model, self.mask[:, : self.length])

    def next(self) -> Any:
        """Run the newest token, or without a cache everything again."""
        return self.forward(0 if self.cache is None else self.length - 1, self.length)

    def _spread(self, out: CausalLMOutputWithPast, copies: int) -> CausalLMOutputWithPast:
        if copies == 1:
            return out
        self.buffer = self.buffer.repeat_interleave(copies, dim=0)
        if self.mask is not None and self.positions is not None:
            self.mask = self.mask.repeat_interleave(copies, dim=0)
            self.positions = self.positions.repeat_interleave(copies, dim=0)
        if self.cache is not None:
            self.cache.batch_repeat_interleave(copies)
        kept = {n: _repeated(getattr(out, n), copies) for n in ("logits", "attentions", "hidden_states")}
        return replace(out, **kept)


def _repeated(value: Any, copies: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_repeated(v, copies) for v in value)
    return None if value is None else value.repeat_interleave(copies, dim=0)


# -- padded prompts run without their padding --------------------------------------------------------------------------


class Unpacking(Cache):
    """Takes keys and values of rows laid end to end, and appends them to a cache where the padded rows have them."""

    packs = True

    def __init__(self, cache: Cache, mask: Tensor):
        """mask: bool (R, P), False on padding."""
        super().__init__()
        self._cache, self._shape = cache, mask.shape
        self._tokens = mask.flatten().nonzero().flatten()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(1, K, n, H) each, which come back as they are: nothing else is to be seen."""
        self._cache.update(self._padded(key_states), self._padded(value_states), layer_idx)
        return key_states, value_states

    def _padded(self, x: Tensor) -> Tensor:
        """(1, K, n, H) -> (R, K, P, H), zero on padding."""
        R, P = self._shape
        _, K, _, H = x.shape
        out = x.new_zeros(R * P, K, H).index_copy_(0, self._tokens.to(x.device), x[0].transpose(0, 1))
        return out.view(R, P, K, H).transpose(1, 2)

    def span(self, queries: int, cache_position: Tensor | None = None) -> tuple[int, int]:
        return 0, queries


def packing_pays(model: CausalLM, mask: Tensor) -> bool:
    """Whether to run these prompts without their padding. mask: bool (R, P)."""
    config = model.config
    if config.attn_implementation not in IMPLEMENTATIONS or not config.is_causal:
        return False
    tokens = int(mask.sum())
    few_enough = tokens <= (1 - WORTH_PADDING) * mask.numel()
    return few_enough and segments_pay(len(mask), tokens) and tokens >= 2 * MIN_SEGMENT


def packed_prefill(model: CausalLM, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None) -> Any:
    """Run prompts (R, P), padded on the left, into a cache; logits (R, 1, V) of the last position of each."""
    last = mask.sum(-1).cumsum(0) - 1
    laid_out = None if cache is None else Unpacking(cache, mask)
    out = forward(model, ids[mask][None], laid_out, positions=positions[mask][None], keep=last)
    if cache is not None:
        cache.note(mask, positions, cache.get_seq_length())
    out.logits = out.logits[0][:, None]
    out.past_key_values = cache
    return out
