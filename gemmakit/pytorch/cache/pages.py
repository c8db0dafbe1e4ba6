"""Which pages of a paged cache are idle, whose they are, and which begin the same way. Bookkeeping only: no tensors.

A page holds the keys and values of `page_size` consecutive tokens of a sequence. A full page never changes again, so
sequences that begin with the same tokens may hold the same page. Source: arXiv:2309.06180.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NULL_PAGE = 0  # stands where a sequence has no page; nobody's, and always zero
# A place in the tree of prefixes: its number or, at a root, the salt of those who share what grows there.
Node = int | str


class Prefix(NamedTuple):
    """Full pages that hold the first tokens of a sequence, and the place in the tree of prefixes where they end."""

    pages: tuple[int, ...] = ()
    node: Node = ""


NO_PREFIX = Prefix()


@dataclass(eq=False)
class Holding:
    """What one sequence holds: its pages in order, and how many of them the tree of prefixes knows, up to `node`."""

    pages: list[int] = field(default_factory=list)
    known: int = 0
    node: Node = ""


class PagePool:
    """Hands out pages 1 to `pages`, counts who holds them, and remembers what full ones contain.

    A page that nobody holds is idle. Its content is kept until the page is handed out again, the longest idle first,
    so a prompt seen before finds its pages; every idle page counts as free.

    share: whether sequences that begin alike hold the same pages.
    """

    def __init__(self, pages: int, page_size: int, share: bool = True):
        self.pages, self.page_size, self.share = pages, page_size, share
        self._holders = [0] * (pages + 1)
        self._idle: OrderedDict[int, None] = OrderedDict((page, None) for page in range(1, pages + 1))
        # A prefix is named by the number of its parent and the tokens of its last page. Numbers are never used again
        # and tokens are compared whole, so two prefixes cannot be mistaken for each other, as two hashes could.
        self._tree: dict[tuple[Node, tuple[int, ...]], tuple[int, int]] = {}
        self._names: dict[int, tuple[Node, tuple[int, ...]]] = {}
        self._last_node = 0
        self.taken = [0] * (pages + 1)  # how often each was handed out
        self.fresh: list[int] = []  # handed out and not yet cleared; who owns the memory empties it

    @property
    def idle(self) -> int:
        return len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.page_size)

    def find(self, tokens: Sequence[int], salt: str = "") -> Prefix:
        """The longest known prefix under this salt, in whole pages; at least one token is left to be computed."""
        pages: list[int] = []
        node: Node = salt
        for i in range((len(tokens) - 1) // self.page_size if self.share else 0):
            entry = self._tree.get((node, self._content(tokens, i)))
            if entry is None:
                break
            page, node = entry
            pages.append(page)
        return Prefix(tuple(pages), node)

    def hold(self, count: int, prefix: Prefix = NO_PREFIX) -> Holding | None:
        """`count` pages, of which the first are those of `prefix`; None, and nothing changed, if too few are idle."""
        revived = sum(page in self._idle for page in prefix.pages)
        if count - len(prefix.pages) > len(self._idle) - revived:
            return None
        for page in prefix.pages:
            self._idle.pop(page, None)
            self._holders[page] += 1
        new = [self._take() for _ in range(count - len(prefix.pages))]
        return Holding([*prefix.pages, *new], len(prefix.pages), prefix.node)

    def grow(self, holding: Holding, count: int) -> bool:
        """Bring a holding to `count` pages; False, and nothing changed, if too few are idle."""
        missing = count - len(holding.pages)
        if missing > len(self._idle):
            return False
        holding.pages.extend(self._take() for _ in range(missing))
        return True

    def remember(self, holding: Holding, tokens: Sequence[int]) -> None:
        """Say what the full pages of a holding contain; `tokens` are those whose keys are in it."""
        for i in range(holding.known, len(tokens) // self.page_size if self.share else 0):
            name, page = (holding.node, self._content(tokens, i)), holding.pages[i]
            if name not in self._tree:  # otherwise another sequence computed the same meanwhile: its page stays known
                self._last_node += 1
                self._tree[name] = page, self._last_node
                self._names[page] = name
            holding.node = self._tree[name][1]
            holding.known = i + 1

    def release(self, holding: Holding) -> None:
        """Give all pages of a holding back."""
        while holding.pages:
            # From the end, for a prefix is of no use without the pages before it.
            page = holding.pages.pop()
            assert self._holders[page] > 0, f"page {page} is released and nobody holds it"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._idle[page] = None
                self._idle.move_to_end(page, last=page in self._names)
        holding.known, holding.node = 0, ""

    def _content(self, tokens: Sequence[int], i: int) -> tuple[int, ...]:
        return tuple(tokens[i * self.page_size : (i + 1) * self.page_size])

    def _take(self) -> int:
        page, _ = self._idle.popitem(last=False)
        name = self._names.pop(page, None)
        if name is not None:
            del self._tree[name]
        self._holders[page] = 1
        self.taken[page] += 1
        self.fresh.append(page)
        return page
