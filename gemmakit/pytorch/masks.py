"""Who may look at whom: causal, padding, bidirectional, packed documents, as one boolean mask a forward pass.

Axis letters: B batch, S query positions, T key positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.pytorch.shapes import Bool, Int, Shaped


@dataclass
class Rule:
    """Who may look at whom in terms instead of a mask, for kernels that never make one.

    Query i of S stands at place past + i of T keys; `past` as a tensor (S,) gives each query's own place. causal: it
    sees no later place. padding: bool (B, T), False hides a key. documents: (B, S) numbers, seen only where equal.
    window: how near a key must be, fewer places away than so many, before or (not causal) after; None for all.
    """

    causal: bool
    past: int | Int[Tensor, " S"]
    queries: int
    keys: int
    padding: Bool[Tensor, "B T"] | None
    documents: Int[Tensor, "#B S"] | None
    device: torch.device
    window: int | None = None
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    def memo(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made by the first layer that asks and kept for the others."""
        if name not in self.derived:
            self.derived[name] = make()
        return self.derived[name]

    def to(self, device: torch.device) -> Rule:
        """The same for a layer on `device`."""
        parts = {n: t for n in ("past", "padding", "documents") if isinstance(t := getattr(self, n), Tensor)}
        if self.device == device and all(t.device == device for t in parts.values()):
            return self
        moved = {n: t.to(device) for n, t in parts.items()}
        return self.memo(f"on {device}", lambda: replace(self, device=device, derived={}, **moved))

    def places(self) -> Int[Tensor, " S"]:
        """Where each query stands."""
        past = self.past
        return torch.arange(past, past + self.queries, device=self.device) if isinstance(past, int) else past

    def masked(self) -> Visibility:
        """The same as a mask."""
        mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.device)
        place, key = self.places()[:, None], torch.arange(self.keys, device=self.device)
        if self.causal and not (self.queries == 1 and isinstance(self.past, int)):
            mask = (key <= place)[None, None]
        if self.window is not None:
            mask = mask & (key > place - self.window)
            mask = mask if self.causal else mask & (key < place + self.window)
        if self.padding is not None:
            mask = mask & self.padding[:, None, None, :].to(self.device)
        if self.documents is not None:
            mask = mask & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        if self.padding is None:  # a query always sees itself
            return Visibility(mask)
        blind = ~mask.any(-1, keepdim=True)
        return Visibility(mask | blind, blind=blind)


class Visibility(NamedTuple):
    """What every layer of one forward pass is told about visibility.

    mask: bool (B or 1, 1, S, T), True where a query may look; or the caller's own 4-D additive mask; or None.
    causal: with mask None, whether queries see only keys up to their own place (S == T); otherwise they see all.
    blind: bool (B or 1, 1, S, 1), True for queries that may look nowhere and must give zeros; None if there are none.
    segments: lengths of the documents of the one row that there is, each to be attended to by itself, causally; None
        where the row is one document.
    last: of the keys only the last so many are seen by any query, and the above speak of those alone; None for all.
    reach: where the queries' places are on the device: of the keys up to the newest query only the last so many are
        seen by any, though the mask speaks of all; None for all, or unknown.
    rule: all of it in terms, where the kernel asked for no mask; mask, causal and blind then say nothing.
    """

    mask: Shaped[Tensor, "#B 1 S T"] | None
    causal: bool = False
    blind: Bool[Tensor, "#B 1 S 1"] | None = None
    rule: Rule | None = None
    segments: tuple[int, ...] | None = None
    last: int | None = None
    reach: int | None = None

    def written_out(self, queries: int, keys: int, device: torch.device) -> Shaped[Tensor, "#B 1 S T"]:
        """One mask over all `keys`, bool, True where a query may look, or the caller's own additive one.

        For attention that is not this package's. A query that may look nowhere looks everywhere.
        """
        told = self if self.rule is None else self.rule.memo("masked", self.rule.masked)
        seen = keys if self.last is None else self.last
        mask = told.mask
        if self.segments is not None:
            lengths = torch.tensor(self.segments, device=device)
            document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
            mask = (document[:, None] == document).tril()[None, None]
        elif mask is None:
            mask = torch.ones((1, 1, queries, seen), dtype=torch.bool, device=device)
            mask = mask.tril(seen - queries) if self.causal else mask
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return torch.nn.functional.pad(mask, (keys - mask.shape[-1], 0), value=hidden)


# Documents this long are better attended to one by one than all together under a mask.
MIN_SEGMENT = 16


def segments_pay(documents: int, tokens: int) -> bool:
    return tokens >= MIN_SEGMENT * documents


def visibility(
    attention_mask: Shaped[Tensor, "B T"] | Shaped[Tensor, "_ _ _ _"] | None,
    *,
    batch: int,
    queries: int,
    keys: int,
    past: int | Int[Tensor, " S"],
    causal: bool,
    position_ids: Int[Tensor, "#B S"] | None,
    device: torch.device,
    window: int | None = None,
    dense: bool = True,
    segmented: bool = False,
    whole: bool = False,
) -> Visibility:
    """Decide the cheapest true description of who sees whom.

    Args:
        attention_mask: (B, T) 0/1 over past and current tokens; or 4-D, bool or additive, used as it is; or None.
        batch, queries, keys: B, S, T.
        past: how many keys stand before the first query; a tensor (S,) gives each query's own place (static caches).
        causal: False lets every token see every other that is not padding.
        window: a query sees keys fewer places away than so many, itself included; None for all.
        position_ids: (B, S) when the caller gave them and there is no cache: a restart begins a document.
        dense: False for kernels that read a Rule and want no mask of S x T.
        segmented: whether the kernel takes `segments`.
        whole: whether to speak of every key, for those who want its weight, though a window hides it from all.

    Raises:
        InputError: a mask whose shape does not fit.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return _given(attention_mask, batch, queries, keys, narrow=window is not None)
    places_known = isinstance(past, int)
    padding = _padding(attention_mask, batch, keys, whole_buffer=not places_known)
    shown = None if attention_mask is None or position_ids is None else attention_mask[:, -queries:] != 0
    documents = packed_documents(position_ids, shown)
    window, last = None if window is None or keys <= window else window, None
    if window is not None and causal and places_known and not whole and queries + window - 1 < keys:
        past, keys = window - 1, queries + window - 1  # nobody sees what stands before
        padding, last = None if padding is None else _hiding(padding[:, -keys:]), keys
        window = window if queries > 1 else None
    if dense and padding is None and documents is None and places_known and window is None:
        if queries == 1 or not causal:
            return Visibility(None, last=last)
        if past == 0:
            return Visibility(None, causal=True)
    if segmented and dense and causal and padding is None and documents is not None:
        found = _segments(documents)
        if found is not None and (window is None or max(found) <= window):
            return Visibility(None, causal=True, segments=found)
    if not causal and not places_known:  # nothing hides what is not written yet
        written = (torch.arange(keys, device=device) <= past[-1]).expand(batch, -1)  # type: ignore[index]
        padding = written if padding is None else written & padding.to(device)
    rule = Rule(causal, past, queries, keys, padding, documents, device, window)
    reach = None if places_known or window is None else queries + window - 1
    return rule.masked()._replace(last=last, reach=reach) if dense else Visibility(None, rule=rule, last=last)


def _given(mask: Shaped[Tensor, "_ _ _ _"], batch: int, queries: int, keys: int, narrow: bool) -> Visibility:
    """narrow: whether it may speak of the last keys alone, the layer's window hiding the others."""
    last = mask.shape[3] if narrow and mask.shape[3] < keys else None
    keys = keys if last is None else last
    ok = mask.shape[0] in (1, batch) and mask.shape[2] in (1, queries) and mask.shape[3] >= keys
    if not ok:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; a 4-D mask for this call is "
            f"({batch}, 1, {queries}, {keys})."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(
            f"attention_mask is 4-D and {mask.dtype}: give bool, True where a query may look, or a float that is added."
        )
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        blind = ~mask.any(-1, keepdim=True)
        return Visibility(mask | blind, blind=blind, last=last)
    blind = (mask <= torch.finfo(mask.dtype).min / 2).all(-1, keepdim=True)
    return Visibility(mask.masked_fill(blind, 0.0), blind=blind, last=last)


def _padding(
    attention_mask: Shaped[Tensor, "B _"] | None, batch: int, keys: int, whole_buffer: bool
) -> Bool[Tensor, "B T"] | None:
    """The 2-D mask as bool, or None when it hides nothing (looked up only where that waits for no device).

    whole_buffer: keys are all places of a static cache; a mask over the tokens so far is widened to them, for the
    causal rule hides the places that are not written yet.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}; give ({batch}, {keys}) or 4-D.")
    if whole_buffer and attention_mask.shape[1] < keys:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, keys - attention_mask.shape[1]))
    if attention_mask.shape[1] != keys:
        raise InputError(
            f"attention_mask covers {attention_mask.shape[1]} positions, but past and current tokens are {keys}: "
            "give one 0 or 1 for each token in the cache and in this call."
        )
    padding = attention_mask.to(torch.bool)
    return padding if whole_buffer else _hiding(padding)  # whoever gives places by a tensor wants nothing read


def _hiding(padding: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"] | None:
    """None when it hides nothing."""
    if padding.device.type != "cpu" or torch.compiler.is_compiling():
        return padding
    return None if bool(padding.all()) else padding


# What collators that pack tell kernels of flash attention, beside the position_ids that say the same.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def check_packing(told: Mapping[str, Any], position_ids: Tensor | None) -> None:
    """Raises InputError for documents that `position_ids` do not tell, TypeError for a name that tells none."""
    for name, value in told.items():
        if name not in PACKING:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        if value is not None and position_ids is None:
            raise InputError(f"{name} tells packed documents, which are told by position_ids that restart: give these.")


def packed_documents(
    position_ids: Int[Tensor, "#B S"] | None, padding: Bool[Tensor, "B S"] | None = None
) -> Int[Tensor, "B S"] | None:
    """Number the packed documents by the places where positions do not go up by one; None if there is one.

    padding: False on tokens that are none and count for nothing; beside it, for positions may leave them out or count
    them, a document begins where positions do not go up at all.
    """
    if position_ids is None or position_ids.shape[1] < 2:
        return None
    follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
    if padding is not None:
        padding = padding.to(position_ids.device)
        place = torch.arange(padding.shape[1], device=padding.device)
        last = torch.where(padding, place, -1).cummax(-1).values[:, :-1]
        before = position_ids.expand(padding.shape).gather(1, last.clamp_min(0))
        follows = ~padding[:, 1:] | (last < 0) | (position_ids[:, 1:] > before)
    if not torch.compiler.is_compiling() and bool(follows.all()):
        return None
    return torch.nn.functional.pad((~follows).cumsum(-1), (1, 0))


def _segments(documents: Int[Tensor, "B S"]) -> tuple[int, ...] | None:
    """The lengths of one row's documents (1, S), where they are long enough; None otherwise."""
    if documents.shape[0] != 1 or torch.compiler.is_compiling():
        return None
    _, lengths = torch.unique_consecutive(documents[0], return_counts=True)
    return tuple(lengths.tolist()) if segments_pay(len(lengths), documents.shape[1]) else None
