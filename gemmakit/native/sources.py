"""What native.so is made from, as one digest: the build writes it into the library, and loading compares."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """Of the C++ in `folder` and of the numbers that it shares with Python, in its ids.py."""
    files = [*sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]), folder / "ids.py"]
    found = hashlib.sha256()
    for file in files:
        text = file.read_bytes()
        found.update(b"%s %d\n%s" % (file.name.encode(), len(text), text))
    return found.hexdigest()[:16]
