"""What comes in and goes out: prompts from arguments, standard input and files; files of results."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gemmakit.errors import InputError
from gemmakit.files import write_text

KINDS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv"}


def texts(argument: str | None, path: Path | None, kind: str, column: str) -> Iterable[str]:
    """What is to be worked on: the argument, a file, all of standard input, or (kind "pipe") its lines as they come."""
    if kind not in ("infer", "pipe", "text", *KINDS.values()):
        raise InputError(f"--format is {kind!r}; it must be infer, text, {', '.join(KINDS.values())} or pipe.")
    if argument is not None and (path is not None or kind != "infer"):
        option = "--input" if path is not None else f"--format {kind}"
        raise InputError(f"the text {argument!r:.40} and {option} are both given: give one of them.")
    if kind == "pipe":
        if path is not None:
            raise InputError("--format pipe reads standard input: leave --input out.")
        return stdin_lines()
    if path is None:
        return [read_prompt(argument)] if kind == "infer" else _read(read_prompt(None), kind, column, "standard input")
    kind = KINDS.get(path.suffix.lower(), "text") if kind == "infer" else kind
    try:
        text = decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"--input {path} cannot be read: {error.strerror}.") from None
    return _read(text, kind, column, f"--input {path}")


def _read(text: str, kind: str, column: str, where: str) -> list[str]:
    """The texts of a file; objects give their field `column`. Raises InputError naming the line or item at fault."""
    items = _items(text, kind, where)
    if not items:
        raise InputError(f"{where} holds no prompts.")
    return [_field(item, column, f"{where}, item {i}") for i, item in enumerate(items, 1)]


def _items(text: str, kind: str, where: str) -> list[Any]:
    lines = text.splitlines() if kind == "text" else [line for line in text.split("\n") if line.strip()]
    if kind == "text":
        return lines
    if kind == "csv":
        return list(csv.DictReader(io.StringIO(text)))
    try:
        found = json.loads(text) if kind == "json" else [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid {kind}: {error}.") from None
    return found if isinstance(found, list) else [found]


def _field(item: Any, column: str, where: str) -> str:
    if isinstance(item, dict):
        if not isinstance(item.get(column), str):
            names = ", ".join(map(str, item))
            raise InputError(f"{where} has no text in {column!r}; it has {names}. Name one with --column.")
        return item[column]
    if not isinstance(item, str):
        raise InputError(f"{where} is {item!r:.40}; it must be a text, or an object with {column!r}.")
    return item


def read_prompt(argument: str | None) -> str:
    """The argument, or all of standard input without its last line end. Raises InputError where there is neither."""
    if argument is not None and argument != "-":
        return check_text(argument)
    if sys.stdin is None or (sys.stdin.isatty() and argument is None):
        raise InputError('there is no prompt: gemmakit run "text", or echo "text" | gemmakit run.')
    text = decode(sys.stdin.buffer.read(), "standard input")
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise InputError('standard input is empty: give a prompt, or start from nothing with gemmakit run "".')
    return text


def stdin_lines() -> Iterator[str]:
    """The lines of standard input, each as soon as it is there."""
    if sys.stdin is None:
        raise InputError("standard input is closed, so there are no lines to read.")
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode(line, f"line {number} of standard input").removesuffix("\n").removesuffix("\r")


def decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}. Convert it first, "
            "for example with iconv -f latin1 -t utf-8."
        ) from None


def check_text(argument: str) -> str:
    """Python smuggles bytes that are no UTF-8 into arguments as lone surrogates."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("the prompt argument is not UTF-8 text. Convert it first, or pipe it from a file.") from None
    return argument


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


class Sink:
    """A file of results. It appears under its name, whole, when the work ends; also when Ctrl-C or an error ends it."""

    def __init__(self, path: Path, overwrite: bool):
        if path.exists() and not overwrite:
            raise InputError(f"--output {path} exists: name another file, or pass --overwrite.")
        if not path.parent.is_dir():
            raise InputError(f"--output {path}: there is no folder {path.parent}.")
        self.path, self.records = path, list[dict[str, Any]]()

    def __enter__(self) -> None:
        pass

    def write(self, text: str) -> None:
        pass

    def put(self, prompt: str, said: Any) -> None:
        self.records.append(said.record(prompt))

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None and not self.records:
            return
        try:
            write_text(self.path, self._text())
        except OSError as error:
            raise InputError(f"--output {self.path} cannot be written: {error.strerror}.") from None

    def _text(self) -> str:
        if self.path.suffix.lower() == ".json":
            return json.dumps(self.records, ensure_ascii=False, indent=2) + "\n"
        if self.path.suffix.lower() == ".csv" and self.records:
            out = io.StringIO()
            table = csv.DictWriter(out, list(self.records[0]))
            table.writeheader()
            table.writerows({k: _cell(v) for k, v in record.items()} for record in self.records)
            return out.getvalue()
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
