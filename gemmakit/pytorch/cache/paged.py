"""Keys and values in pages: rows of any length share one memory, which is taken once and never grows.

Axis letters: B rows, S new tokens a row, P pages a row, T key positions, K kv heads, H head_dim. A place is a number of
the flat memory, page * page_size + offset. Who holds which page is decided in pages.py.
Source: arXiv:2309.06180.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor

from gemmakit.checkpoint.memory import require_memory
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError, NotEnoughMemory
from gemmakit.family import layer_type
from gemmakit.pytorch.cache.core import Cache
from gemmakit.pytorch.cache.pages import NULL_PAGE
from gemmakit.pytorch.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Span:
    """Tokens start..end of one row, and its pages in order."""

    pages: Sequence[int]
    start: int
    end: int


@dataclass(frozen=True)
class Placement:
    """Where one forward pass writes and reads. An attention kernel that reads pages in place needs nothing more.

    places: (B * S,) int64, where the new tokens go. table: (B, P) int64, the pages of each row in order, NULL_PAGE
    behind them. lengths: (B,) int64, tokens a row has with the new ones. past: tokens before the new ones, if all rows
    have the same. keys: T, the positions that are read, at most P * page_size. window: of them a query sees the newest
    so many; None for all.

    In a packed pass the new tokens of B rows, any number of each, lie end to end in one row of S. spans: these rows.
    starts: (B + 1,) int64, where the new tokens of each begin among the S, and S; None in a pass that is not packed.
    """

    places: Int[Tensor, " BS"]
    table: Int[Tensor, "B P"]
    lengths: Int[Tensor, " B"]
    past: int
    keys: int
    window: int | None = None
    spans: Sequence[Span] = ()
    starts: Int[Tensor, " B+1"] | None = None
    derived: dict[int, Placement] = field(default_factory=dict["int", "Placement"], init=False, repr=False)

    @property
    def positions(self) -> Int[Tensor, "B S"]:
        """(B, 1): the position of the one new token of each row; in a packed pass (1, S), those of all its tokens."""
        if self.starts is None:
            return self.lengths[:, None] - 1
        counts = self.starts.diff()
        first = (self.lengths - counts - self.starts[:-1]).repeat_interleave(counts, output_size=len(self.places))
        return (first + torch.arange(len(self.places), device=first.device))[None]

    @property
    def mask(self) -> Bool[Tensor, "B 1 1 T"]:
        """bool (B, 1, 1, T): the one new token of each row sees the tokens of its row."""
        place, lengths = torch.arange(self.keys, device=self.lengths.device), self.lengths[:, None, None, None]
        seen = place < lengths
        return seen if self.window is None else seen & (place >= lengths - self.window)

    def within(self, window: int | None, page_size: int) -> Placement:
        """The same for a layer with a window, as if the pages that it hides from all new tokens were not there."""
        B, P = self.table.shape
        reach = 0 if window is None else window + len(self.places) // B - 1
        if window is None or self.keys <= reach or self.starts is not None:
            return self
        if window not in self.derived:
            # No length is read: a step that is recorded works this out anew each time.
            first = (self.lengths - reach).clamp_min(0) // page_size
            pages = min(P, (reach - 2) // page_size + 2)
            at = first[:, None] + torch.arange(pages, device=first.device)
            table = torch.where(at < P, self.table.gather(1, at.clamp_max(P - 1)), NULL_PAGE)
            gone = (self.keys - reach) // page_size * page_size
            alone = B == 1 and self.past + len(self.places) == self.keys  # without a mask its keys end with its last
            keys = self.keys - gone if alone else pages * page_size
            lengths = self.lengths - first * page_size
            self.derived[window] = Placement(self.places, table, lengths, self.past - gone, keys, window)
        return self.derived[window]


def sent(numbers: Sequence[Any], device: torch.device) -> Int[Tensor, ...]:
    """Whole numbers of the host as int64 on `device`, for which the host does not wait, nor for what runs there."""
    there = torch.tensor(numbers, dtype=torch.long, device="cpu")
    # From memory that is not pinned a copy waits for all that was started before it.
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there.to(device)


class PagedCache(Cache):
    """`pages` pages of `page_size` tokens for every layer, and one that is always zero.

    Before each forward pass `place` says which rows it holds; `update` then appends to their pages and gathers them.
    No row belongs to the cache itself, so it cannot be cropped, reordered or read as the older tuple.

    dtype: of the keys and values, and so of the activations. devices: one a layer; one for all by default.

    Raises NotEnoughMemory when the pages do not fit, before they are taken where the system tells.
    """

    def __init__(
        self,
        config: GemmaConfig,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device] | torch.device | str = "cpu",
    ):
        super().__init__()
        self.page_size, self.pages = page_size, pages
        self.placement: Placement | None = None
        if isinstance(devices, torch.device | str):
            devices = [torch.device(devices)] * config.num_hidden_layers
        specs = config.kv_layers()
        self.windows = [spec.window for spec in specs]
        needed = (pages + 1) * page_size * bytes_per_token(config, dtype)
        self._check_memory(needed, devices)
        # (2, pages + 1, page_size, K, H): keys and values; the heads of a token lie together, as they come.
        self.storage = [
            torch.zeros((2, pages + 1, page_size, s.num_key_value_heads, s.head_dim), dtype=dtype, device=device)
            for s, device in zip(specs, devices, strict=False)
        ]

    # -- for the engine --------------------------------------------------------------------------------------------

    def place(self, spans: Sequence[Span], packed: bool = False) -> Placement:
        """Set what the next forward pass is about: several rows of one new token each, or one row of any number; or,
        packed, several of any number as one row.
        """
        size, device = self.page_size, self.storage[0].device
        counts = [span.end - span.start for span in spans]
        if not packed and len(spans) > 1 and any(count != 1 for count in counts):
            raise InputError("rows of several new tokens are run one at a time, or packed.")
        held = [span.pages[: -(-span.end // size)] for span in spans]
        width = max(len(pages) for pages in held)
        table = [[*pages, *[NULL_PAGE] * (width - len(pages))] for pages in held]
        places = [span.pages[i // size] * size + i % size for span in spans for i in range(span.start, span.end)]
        self.placement = Placement(
            places=sent(places, device),
            table=sent(table, device),
            lengths=sent([span.end for span in spans], device),
            past=0 if packed else spans[0].start,
            keys=sum(counts) if packed else spans[0].end if len(spans) == 1 else width * size,
            spans=tuple(spans),
            starts=sent([0, *accumulate(counts)], device) if packed else None,
        )
        return self.placement

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages that go to a new owner: what is masked still multiplies, and 0 * NaN would be NaN."""
        if pages:
            at = {device: sent(pages, device) for device in {store.device for store in self.storage}}
            for store in self.storage:
                store.index_fill_(1, at[store.device], 0)

    def masks(self) -> dict[str, Bool[Tensor, "B 1 1 _"]]:
        """By the kind of layer, bool (B, 1, 1, T): what the one new token of each row sees of what `update` gives."""
        where = self._required()
        return {layer_type(window): where.within(window, self.page_size).mask for window in dict.fromkeys(self.windows)}

    def placement_of(self, layer_idx: int) -> Placement | None:
        """The placement as this layer reads it."""
        where = self.placement
        return None if where is None else where.within(self.windows[layer_idx], self.page_size)

    @property
    def packed(self) -> bool:
        return self.placement is not None and self.placement.starts is not None

    # -- for the model ---------------------------------------------------------------------------------------------

    def update(
        self,
        key_states: Float[Tensor, "B K S H"],
        value_states: Float[Tensor, "B K S H"],
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "B K T H"], Float[Tensor, "B K T H"]]:
        """Append (B, K, S, H) to the rows' pages; give their keys and values, (B, K, T, H), those of no row zero."""
        where, store = self.write(key_states, value_states, layer_idx), self.storage[layer_idx]
        if where.keys == key_states.shape[2]:  # all there is to see is new
            return key_states, value_states
        return self._gather(store, where.within(self.windows[layer_idx], self.page_size))

    def write(
        self, key_states: Float[Tensor, "B K S H"], value_states: Float[Tensor, "B K S H"], layer_idx: int
    ) -> Placement:
        """Append to the rows' pages, and read nothing."""
        where, store = self.placed(key_states.shape[0], key_states.shape[2]), self.storage[layer_idx]
        new = torch.stack((key_states, value_states)).detach().transpose(2, 3).flatten(1, 2)  # (2, B * S, K, H)
        store.flatten(1, 2).index_copy_(1, where.places.to(store.device), new.to(store.dtype))
        return where

    def read(
        self, layer_idx: int, row: int, end: int, last: int
    ) -> tuple[Float[Tensor, "1 K T H"], Float[Tensor, "1 K T H"]]:
        """Of a placed row's first `end` tokens the last T = `last`: their keys and values, copied together."""
        where, store, size = self._required(), self.storage[layer_idx], self.page_size
        first = (end - last) // size
        pages = where.table[row, first : -(-end // size)].to(store.device)
        rows = store.index_select(1, pages).flatten(1, 2)[:, None, : end - first * size][:, :, -last:]
        return rows[0].transpose(1, 2), rows[1].transpose(1, 2)

    def span(self, queries: int, cache_position: Tensor | None = None) -> tuple[int, int]:
        """Tokens before the first query and keys it sees; with rows of different lengths the mask tells the rest."""
        where = self._required()
        return where.past, where.keys

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the next ones of the placed row, or of the first."""
        return 0 if self.placement is None else self.placement.past

    def reset(self) -> None:
        """Forget the placement; the pages keep their content and their owners."""
        self.placement = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory held; constant."""
        return sum(store.nbytes for store in self.storage)

    def __len__(self) -> int:
        return len(self.storage)

    def crop(self, max_length: int) -> None:
        self._no_rows()

    def batch_select_indices(self, indices: Tensor) -> None:
        self._no_rows()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._no_rows()

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        self._no_rows()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _gather(
        self, store: Float[Tensor, "2 pages size K H"], where: Placement
    ) -> tuple[Float[Tensor, "B K T H"], Float[Tensor, "B K T H"]]:
        """The plain form of reading pages: copy them together. A kernel that walks the table copies nothing."""
        B, P = where.table.shape
        rows = store.index_select(1, where.table.to(store.device).flatten())  # (2, B * P, page_size, K, H)
        rows = rows.view(2, B, P * self.page_size, *store.shape[3:])[:, :, : where.keys].transpose(2, 3)
        return rows[0], rows[1]

    def placed(self, B: int, S: int) -> Placement:
        """The placement, if it is of a pass of B rows of S tokens. Raises InputError for another."""
        where = self._required()
        rows = 1 if self.packed else len(where.table)
        if (rows, len(where.places)) != (B, B * S):
            raise InputError(
                f"this call has {B} rows of {S} tokens, but {rows} rows with {len(where.places)} tokens in "
                "all were placed: call place() before each forward pass."
            )
        return where

    def _required(self) -> Placement:
        if self.placement is None:
            raise InputError("a paged cache does not know whose tokens these are: call place() before a forward pass.")
        return self.placement

    def _no_rows(self) -> NoReturn:
        raise InputError("a paged cache has pages and no rows of its own: use a DynamicCache or a StaticCache.")

    def _check_memory(self, needed: int, devices: Sequence[torch.device]) -> None:
        what = f"a paged cache of {self.pages * self.page_size} tokens"
        remedy = "Pass a smaller cache_tokens or max_batch_size."
        if devices[0].type == "cpu":
            require_memory(needed, what, remedy=remedy)
        elif devices[0].type == "cuda" and len(set(devices)) == 1:
            # What torch has reserved and not given out is free too.
            reserved = torch.cuda.memory_reserved(devices[0]) - torch.cuda.memory_allocated(devices[0])
            free = torch.cuda.mem_get_info(devices[0])[0] + reserved
            if needed > free:
                raise NotEnoughMemory(f"{what} needs {needed} bytes, but {free} bytes are free on the GPU. {remedy}")


def bytes_per_token(config: GemmaConfig, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take in all layers."""
    return sum(2 * spec.num_key_value_heads * spec.head_dim for spec in config.kv_layers()) * dtype.itemsize
