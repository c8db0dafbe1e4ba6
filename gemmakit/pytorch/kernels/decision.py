"""Which code runs, and why."""

from __future__ import annotations

from typing import NamedTuple


class Decision(NamedTuple):
    """path: what runs, in words; why: what keeps a faster path away, empty where nothing does. Printed as both."""

    path: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.path} ({self.why})" if self.why else self.path
