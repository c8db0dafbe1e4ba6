"""The bytes of a GGUF header, version 3, for a file whose tensors follow in the order given."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from typing import Any

from gemmakit.gguf.header import ARRAY, BOOL, MAGIC, TEXT
from gemmakit.gguf.kinds import Kind

ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32 = 4, 5, 6


def encode_header(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Kind, tuple[int, ...]]]) -> bytes:
    """The file up to its first tensor; each tensor is followed by `padding` of its size.

    metadata: numbers (whole ones from 0 to 2**32 - 1; others as float32), bool, str, or lists of one of them.
    tensors: name -> type and shape, outermost first.
    """
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for name, (kind, shape) in tensors.items():
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_text(name), dimensions, struct.pack("<IQ", kind.number, offset)]
        size = kind.size(prod(shape))
        offset += size + padding(size)
    header = b"".join(parts)
    return header + b"\0" * padding(len(header))


def padding(size: int) -> int:
    """Bytes from `size` to the next place where a tensor may begin."""
    return -size % ALIGNMENT


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0], _INT32) if value else TEXT
        items = b"".join(map(_text, value)) if kind == TEXT else _numbers(kind, value)
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + items
    kind = _kind(value, _UINT32)
    return struct.pack("<I", kind) + (_text(value) if kind == TEXT else _numbers(kind, [value]))


def _kind(value: Any, whole: int) -> int:
    if isinstance(value, bool):
        return BOOL
    return TEXT if isinstance(value, str) else whole if isinstance(value, int) else _FLOAT32


def _numbers(kind: int, values: list[Any]) -> bytes:
    letter = {BOOL: "?", _UINT32: "I", _INT32: "i", _FLOAT32: "f"}[kind]
    return struct.pack(f"<{len(values)}{letter}", *values)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
