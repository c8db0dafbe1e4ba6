"""Decoding as tokens arrive: which text can no longer change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

from gemmakit.text.encoding import to_lists
from gemmakit.text.vocabulary import bytes_to_text

# Cleaning up drops a space in view of what follows it; its rules together look this many characters ahead at most.
CLEAN_UP_SIGHT = 24


class Decoder(Protocol):
    """What `push` returns and what `finish` returns, put together, equal `decode` of all ids."""

    def push(self, ids: Any) -> str:
        """Take an id, or some (list or tensor); return the text that is now certain. Raises TokenOutOfRange."""
        ...

    def finish(self) -> str:
        """The text still held back. The decoder can be used again afterwards."""
        ...

    @property
    def held(self) -> str:
        """The text still held back, as it would be if nothing more came."""
        ...


class IncrementalDecoder:
    """Turns a stream of ids into a stream of text that never has to be taken back.

    What `push` returns and what `finish` returns, put together, equal `decode` of all ids. A run of byte pieces is held
    until it ends, because one wrong byte makes the whole run unreadable. A token costs the same wherever it stands.

    shown: what an id adds to the text. skip: ids that add nothing. alone: ids that spaces part from their neighbours.
    """

    def __init__(self, shown: Mapping[int, str | int], skip: Collection[int] = (), alone: Collection[int] = ()) -> None:
        self._shown, self._skip, self._alone = shown, skip, alone
        self._bytes = bytearray()
        self._last: int | None = None

    def push(self, ids: Any) -> str:
        """Take an id, or some (list or tensor); return the text that is now certain. Raises TokenOutOfRange."""
        ids = to_lists(ids)
        listed: Iterable[int] = [ids] if isinstance(ids, int) else ids
        parts: list[str] = []
        for index in listed:
            if index in self._skip:
                continue
            piece = self._shown[index]
            if self._alone:
                if self._last is not None and (index in self._alone or self._last in self._alone):
                    parts += [self._held(), " "]
                self._last = index
            if isinstance(piece, int):
                self._bytes.append(piece)
                continue
            if self._bytes:
                parts.append(self._held())
            parts.append(piece)
        return "".join(parts)

    def finish(self) -> str:
        """The text still held back. The decoder can be used again afterwards."""
        self._last = None
        return self._held()

    @property
    def held(self) -> str:
        """The text still held back, as it would be if nothing more came."""
        return bytes_to_text(self._bytes)

    def _held(self) -> str:
        text = bytes_to_text(self._bytes)
        self._bytes.clear()
        return text


class CleanedDecoder:
    """A decoder's text after `clean`, which drops spaces, held back as far as its rules look ahead."""

    def __init__(self, decoder: Decoder, clean: Callable[[str], str]) -> None:
        self._decoder, self._clean = decoder, clean
        self._raw, self._given = "", 0

    def push(self, ids: Any) -> str:
        self._raw += self._decoder.push(ids)
        now, before = self._clean(self._raw), self._clean(self._raw[:-CLEAN_UP_SIGHT])
        same = 0
        while same < len(before) and before[same] == now[same]:
            same += 1
        return self._new(now[:same])

    def finish(self) -> str:
        text = self._new(self._clean(self._raw + self._decoder.finish()))
        self._raw, self._given = "", 0
        return text

    @property
    def held(self) -> str:
        return self._clean(self._raw + self._decoder.held)[self._given :]

    def _new(self, certain: str) -> str:
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        return new
