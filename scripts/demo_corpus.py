"""The demo model's text: Python's own documentation, as every Python installation carries it.

Two sources, both under the PSF License Version 2: the language reference in `pydoc_data.topics`, and the docstrings of
the standard library, read from its source files without importing them.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

HELD_OUT_SHARE = 20
LICENCE = "Python documentation and docstrings, PSF License Version 2, https://docs.python.org/3/license.html"

# Tests and bundled programs hold little prose; site-packages is not Python's own.
_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip",
         "pydoc_data", "__pycache__", "_vendor"}  # fmt: skip
_MIN_CHARACTERS = 60


def documents() -> dict[str, str]:
    """Every document by its name ("topics/with", "textwrap.shorten"), in a fixed order, no text twice."""
    out: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in [*_topics(), *_docstrings(Path(sysconfig.get_path("stdlib")))]:
        body = text.strip() + "\n"
        if len(body) >= _MIN_CHARACTERS and body not in seen:
            seen.add(body)
            out.setdefault(name, body)
    return out


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def _docstrings(library: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIP.intersection(parts) or any(part.startswith("config-") for part in parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        yield from _of_node(tree, ".".join(parts), "")


def _of_node(node: ast.AST, name: str, heading: str) -> Iterator[tuple[str, str]]:
    """The docstring of a module, class or function behind its signature as `help()` shows it, then those inside it."""
    assert isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    doc = ast.get_docstring(node)
    if doc:
        yield name, heading + doc
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _of_node(child, f"{name}.{child.name}", f"class {child.name}\n\n")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _of_node(child, f"{name}.{child.name}", f"{child.name}({ast.unparse(child.args)})\n\n")


def is_held_out(name: str) -> bool:
    """Whether a document is kept from training. By name, so that another Python version splits alike."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _even(paragraph: str) -> str:
    return re.sub(r"\s+", " ", paragraph).strip()


def held_out_text(docs: dict[str, str], limit: int = 96_000) -> str:
    """The held-out documents, one behind the other, up to `limit` characters."""
    out = ""
    for name, text in docs.items():
        if is_held_out(name) and len(out) + len(text) < limit:
            out += text + "\n\n"
    return out


def training_texts(docs: dict[str, str], held: str) -> list[str]:
    """The documents to train on: not those held out by name, and without the paragraphs that the text `held` has too.

    The second rule is for chapters that quote each other, and it keeps a committed held-out text unseen when Python's
    documentation has moved on since. Only paragraphs of 40 characters and more count: "Return True." is no quotation.
    """
    unseen = {even for p in re.split(r"\n\s*\n", held) if len(even := _even(p)) >= 40}
    out = []
    for name, text in docs.items():
        if is_held_out(name):
            continue
        kept = "".join(p for p in re.split(r"(\n\s*\n)", text) if _even(p) not in unseen).strip() + "\n"
        if len(kept) >= _MIN_CHARACTERS:
            out.append(kept)
    return out


def pieces(tokens: Sequence[int], size: int, first: int) -> Iterator[list[int]]:
    """Cut a document into `size` tokens a piece, the first one `first` tokens long."""
    start = 0
    for end in [*range(first, len(tokens), size), len(tokens)]:
        if end > start:
            yield list(tokens[start:end])
        start = end
