"""Decoding as tokens arrive."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from gemmakit.text.encoding import to_lists
from gemmakit.text.vocabulary import bytes_to_text


class IncrementalDecoder:
    """Turns a stream of ids into a stream of text that never has to be taken back.

    What `push` returns and what `finish` returns, put together, equal `decode` of all ids. A run of byte pieces is held
    until it ends, because one wrong byte makes the whole run unreadable. A token costs the same wherever it stands.
    """

    def __init__(self, shown: Mapping[int, str | int], skip: Container[int] = ()) -> None:
        self._shown = shown
        self._skip = skip
        self._bytes = bytearray()

    def push(self, ids: Any) -> str:
        """Take an id, or some (list or tensor); return the text that is now certain. Raises TokenOutOfRange."""
        ids = to_lists(ids)
        listed: Iterable[int] = [ids] if isinstance(ids, int) else ids
        parts: list[str] = []
        for index in listed:
            if index in self._skip:
                continue
            piece = self._shown[index]
            if isinstance(piece, int):
                self._bytes.append(piece)
            else:
                parts += [self.finish(), piece]
        return "".join(parts)

    def finish(self) -> str:
        """The text still held back. The decoder can be used again afterwards."""
        text = bytes_to_text(self._bytes)
        self._bytes.clear()
        return text
