"""Files of rows: JSON lines, JSON, CSV and Parquet; each bad one named by file and line, before anything is trained."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmakit.errors import InputError, MissingDependency

KINDS = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = ("train", "valid", "test")
# What cells of tables hold as JSON text.
NESTED = ("messages", "tools", "prompt", "completion", "chosen", "rejected")
SHOWN_ERRORS = 10


@dataclass(frozen=True)
class Row:
    """where: "data.jsonl:3", the line counted from 1 (of JSON and Parquet: the item)."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """The rows of a file, and the SHA-256 of what it held when they were read."""

    path: Path
    digest: str
    rows: list[Row]


class Refusals:
    """Errors by line, gathered so that all are told at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, where: str, error: object) -> None:
        self.found.append(f"{where}: {error}")

    def end(self) -> None:
        """Raises InputError with the first few."""
        if self.found:
            more = len(self.found) - SHOWN_ERRORS
            told = " | ".join(self.found[:SHOWN_ERRORS]) + (f" | and {more} more rows" if more > 0 else "")
            raise InputError(f"{len(self.found)} rows cannot be trained on, nothing was. {told}")


def find_splits(data: str) -> dict[str, Path]:
    """The files of a path: itself for training, or of a folder train, valid and test, in any of the formats."""
    path = Path(data).expanduser()
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise InputError(f"the data {data} is neither a file nor a folder.")
    found: dict[str, Path] = {}
    for split in SPLITS:
        files = [path / f"{split}{kind}" for kind in KINDS if (path / f"{split}{kind}").is_file()]
        if len(files) > 1:
            raise InputError(f"{path} has {' and '.join(file.name for file in files)}: keep one of them.")
        if files:
            found[split] = files[0]
    if "train" not in found:
        raise InputError(f"{path} has no train file: it must be called train with one of {', '.join(KINDS)}.")
    return found


def read(path: Path, columns: Mapping[str, str]) -> Source:
    """The rows of a file, with the columns renamed. columns: {what is read here: its name in the file}.

    Raises InputError that names each bad row by its line, MissingDependency for Parquet without pyarrow.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"{path} is no data file that is known: name it {', '.join(KINDS)}.")
    content = _content(path)
    refused, rows = Refusals(), list[Row]()
    for number, found in _ITEMS[kind](content, path):
        where = f"{path.name}:{number}"
        if isinstance(found, Exception):
            refused.add(where, found)
        elif not isinstance(found, dict):
            refused.add(
                where, f"is {found!r:.40}; it must be an object with messages, or prompt and completion, or text."
            )
        else:
            rows.append(Row(where, _renamed(found, columns)))
    refused.end()
    if not rows:
        raise InputError(f"{path} holds no rows.")
    missing = [f"{name}={column}" for name, column in columns.items() if not any(name in row.values for row in rows)]
    if missing:
        has = ", ".join(map(str, rows[0].values))
        raise InputError(f"--columns {','.join(missing)}: no row of {path} has it; the first has {has}.")
    return Source(path, hashlib.sha256(content).hexdigest(), rows)


def _content(path: Path) -> bytes:
    """All of the file as it stood at one time: half of an old one and half of a new one is nobody's data."""
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            content = file.read()
            after, named = os.fstat(file.fileno()), path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    stood = [(one.st_ino, one.st_size, one.st_mtime_ns) for one in (before, after, named)]
    if len(set(stood)) > 1 or len(content) != before.st_size:
        raise InputError(f"{path} changed while it was read: tune again once whoever writes it has ended.")
    return content


def _renamed(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    back = {column: name for name, column in columns.items()}
    return {back.get(key, key): value for key, value in values.items() if value is not None}


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line} is not UTF-8 text: byte 0x{content[error.start]:02x}.") from None


def _jsonl(content: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(content, path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, ValueError(f"is not valid JSON: {error}")


def _json(content: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        found = json.loads(_text(content, path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    yield from enumerate(found if isinstance(found, list) else [found], 1)


def _csv(content: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(io.StringIO(_text(content, path), newline=""))
    try:
        for row in table:
            if None in row or None in row.values():
                yield (
                    table.line_num,
                    ValueError(f"has not the {len(table.fieldnames or ())} cells that the header names"),
                )
            else:
                yield table.line_num, {key: _cell(key, value) for key, value in row.items() if value != ""}
    except csv.Error as error:
        raise InputError(f"{path}:{table.line_num} is not valid CSV: {error}.") from None


def _cell(name: str, value: str) -> Any:
    """Lists and objects are JSON text in a cell."""
    if name in NESTED and value[:1] in "[{":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _parquet(content: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingDependency(
            f"{path} is Parquet, which needs pyarrow: pip install pyarrow, or give JSON lines."
        ) from None
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except Exception as error:  # its own kinds, which only it names
        raise InputError(f"{path} cannot be read as Parquet: {error}.") from None
    yield from enumerate(rows, 1)


_ITEMS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
