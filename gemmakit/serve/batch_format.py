"""The lines of batch files, for the server and for `gemmakit batch`.

OpenAI's: {"custom_id", "method": "POST", "url", "body"} in; out comes {"id", "custom_id", "response": {"status_code",
"request_id", "body"}, "error"}. Our short one: {"prompt"}, {"messages"} or {"input"} in, with settings and perhaps a
custom_id beside it; out comes {"custom_id", "text", "finish_reason", "usage"} or {"custom_id", "embedding", "usage"}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
SHORT = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}
MAX_LINE_BYTES = 8 << 20
MAX_ID_CHARACTERS = 512


@dataclass(frozen=True)
class Row:
    """A request of a batch: `line` from 1, what is asked of `url`; `short` says which format it came and goes in."""

    line: int
    custom_id: str
    url: str
    body: Mapping[str, Any]
    short: bool = False


@dataclass(frozen=True)
class BadRow:
    """A line that asks nothing we know: why, as an error code and a sentence; its id where it has one."""

    line: int
    code: str
    message: str
    custom_id: str | None = None


class _Refused(Exception):
    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code, self.message = code, message


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one over MAX_LINE_BYTES its beginning, one byte longer than a line may be."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)


def read_rows(lines: Iterable[bytes], endpoint: str | None = None) -> Iterator[Row | BadRow]:
    """What each line asks, in order; empty lines count but ask nothing. An id that stood before makes a row bad.

    endpoint: the only url that rows may have; None for any of ENDPOINTS.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_row(line, number, endpoint)
        if isinstance(row, Row) and (first := seen.setdefault(row.custom_id, number)) != number:
            message = f"line {number}: custom_id {row.custom_id!r} stands in line {first} already."
            row = BadRow(number, "duplicate_custom_id", message, row.custom_id)
        yield row


def parse_row(line: bytes, number: int, endpoint: str | None = None) -> Row | BadRow:
    """The request in a line, or what is wrong with it. `number`: which line it is, from 1."""
    found: dict[str, Any] = {}
    try:
        found = _object(line)
        row = _openai(found, number) if "body" in found or "url" in found else _short(found, number)
        if row.url not in ((endpoint,) if endpoint else ENDPOINTS):
            wanted = endpoint or ", ".join(ENDPOINTS)
            raise _Refused("invalid_url", f"url is {row.url!r:.80}; it must be {wanted}.")
        if row.body.get("stream"):
            raise _Refused("invalid_request", "stream is true; a batch gives whole answers. Leave stream out.")
        return row
    except _Refused as error:
        said = found.get("custom_id")
        return BadRow(number, error.code, f"line {number}: {error.message}", said if isinstance(said, str) else None)


def result_line(row: Row, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """The line for an answer: in the row's own format where there is one, OpenAI's with the line's number where not."""
    if status >= 400:
        return {**_openai_line(row, status, body), "line": row.line}
    return _short_line(row, body) if row.short else _openai_line(row, status, body)


def error_line(row: BadRow) -> dict[str, Any]:
    """The line for a row that could not be asked."""
    error = {"code": row.code, "message": row.message}
    name = _request_id(row.custom_id or f"line {row.line}")
    return {"id": name, "custom_id": row.custom_id, "response": None, "error": error, "line": row.line}


def dump_line(result: Mapping[str, Any]) -> bytes:
    return json.dumps(result, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise _Refused("line_too_long", f"it is longer than {MAX_LINE_BYTES} bytes.")
    try:
        found = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Refused("invalid_json_line", f"it is not valid JSON ({str(error)[:100]}).") from None
    if not isinstance(found, dict):
        raise _Refused("invalid_json_line", f"it holds a JSON {type(found).__name__}; it must be an object.")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _openai(found: dict[str, Any], number: int) -> Row:
    if found.get("method") != "POST":
        raise _Refused("invalid_method", f"method is {found.get('method')!r:.40}; it must be 'POST'.")
    if not isinstance(found.get("body"), dict):
        raise _Refused("missing_required_parameter", f"body is {found.get('body')!r:.40}; it must be an object.")
    return Row(number, _custom_id(found.get("custom_id")), str(found.get("url")), found["body"])


def _short(found: dict[str, Any], number: int) -> Row:
    asked = [name for name in SHORT if name in found]
    if len(asked) != 1:
        what = f"it has {' and '.join(asked)}" if asked else f"it has {', '.join(map(repr, found)) or 'nothing'}"
        raise _Refused("invalid_request", f"{what:.200}; give one of prompt, messages, input; or method, url and body.")
    name = _custom_id(found.get("custom_id", f"row-{number}"))
    return Row(number, name, SHORT[asked[0]], {k: v for k, v in found.items() if k != "custom_id"}, True)


def _custom_id(name: Any) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_ID_CHARACTERS:
        raise _Refused(
            "invalid_custom_id", f"custom_id is {name!r:.40}; it must be a text of 1 to {MAX_ID_CHARACTERS} characters."
        )
    return name


def _request_id(custom_id: str) -> str:
    """The same at every run, so that a resumed batch gives the lines that an uninterrupted one gives."""
    return f"batch_req_{hashlib.sha256(custom_id.encode('utf-8', 'backslashreplace')).hexdigest()[:24]}"


def _openai_line(row: Row, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    name = _request_id(row.custom_id)
    response = {"status_code": status, "request_id": name, "body": body}
    return {"id": name, "custom_id": row.custom_id, "response": response, "error": None}


def _short_line(row: Row, body: Mapping[str, Any]) -> dict[str, Any]:
    line = {"custom_id": row.custom_id, "usage": body.get("usage")}
    if "data" in body:
        vectors = [item["embedding"] for item in body["data"]]
        return {**line, **({"embedding": vectors[0]} if len(vectors) == 1 else {"embeddings": vectors})}
    choices = body["choices"]
    message: Mapping[str, Any] = choices[0].get("message", {})
    if len(choices) > 1 or choices[0].get("logprobs") or message.get("tool_calls"):
        return {**line, "choices": choices}
    text = choices[0]["text"] if "text" in choices[0] else message["content"]
    thought = {"reasoning": message["reasoning"]} if "reasoning" in message else {}
    return {**line, "text": text, **thought, "finish_reason": choices[0]["finish_reason"]}
