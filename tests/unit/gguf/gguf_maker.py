"""GGUF files made byte by byte, so that any part can be wrong; independent of gemmakit's own writer."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, F32, BOOL, TEXT, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(kind: int, content) -> bytes:
    """content of ARRAY: (type of the items, items)."""
    if kind == TEXT:
        return text(content)
    if kind == ARRAY:
        inner, items = content
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
    return struct.pack("<" + LETTERS[kind], content)


def pair(key: str | bytes, kind: int, content) -> bytes:
    return text(key) + struct.pack("<I", kind) + value(kind, content)


def place(name: str | bytes, dims: list[int], kind: int, offset: int) -> bytes:
    """dims: innermost first, as the file has them."""
    return (
        text(name)
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


@dataclass
class Maker:
    """The parts of a file; a count of None is the true one."""

    pairs: list[bytes] = field(default_factory=list)
    places: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    tensors: int | None = None
    count: int | None = None
    alignment: int = 32

    def bytes(self) -> bytes:
        tensors = len(self.places) if self.tensors is None else self.tensors
        count = len(self.pairs) if self.count is None else self.count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, count) + b"".join(self.pairs + self.places)
        return head + b"\0" * (-len(head) % self.alignment) + self.data


WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "b"]
SETTINGS = [
    pair("general.architecture", TEXT, "gemma"),
    pair("gemma.context_length", U32, 64),
    pair("gemma.embedding_length", U32, 4),
    pair("gemma.block_count", U32, 1),
    pair("gemma.feed_forward_length", U32, 8),
    pair("gemma.attention.head_count", U32, 2),
    pair("gemma.attention.head_count_kv", U32, 1),
    pair("gemma.attention.key_length", U32, 2),
    pair("gemma.attention.layer_norm_rms_epsilon", F32, 1e-6),
    pair("tokenizer.ggml.model", TEXT, "llama"),
    pair("tokenizer.ggml.tokens", ARRAY, (TEXT, WORDS)),
    pair("tokenizer.ggml.scores", ARRAY, (F32, [0.0, 0, 0, 0, -1, -2])),
    pair("tokenizer.ggml.token_type", ARRAY, (5, [3, 3, 3, 2, 1, 1])),
    pair("tokenizer.ggml.bos_token_id", U32, 2),
    pair("tokenizer.ggml.eos_token_id", U32, 1),
    pair("tokenizer.ggml.padding_token_id", U32, 0),
    pair("tokenizer.ggml.unknown_token_id", U32, 3),
]
# name, dimensions as the file has them; all F32
TENSORS = [
    ("token_embd.weight", [4, 6]), ("blk.0.attn_norm.weight", [4]), ("blk.0.attn_q.weight", [4, 4]),
    ("blk.0.attn_k.weight", [4, 2]), ("blk.0.attn_v.weight", [4, 2]), ("blk.0.attn_output.weight", [4, 4]),
    ("blk.0.ffn_norm.weight", [4]), ("blk.0.ffn_gate.weight", [4, 8]), ("blk.0.ffn_up.weight", [4, 8]),
    ("blk.0.ffn_down.weight", [8, 4]), ("output_norm.weight", [4]),
]  # fmt: skip


def small() -> Maker:
    """A whole model of 200 numbers, with a tokenizer of six pieces."""
    places, data = [], b""
    for name, dims in TENSORS:
        count = dims[0] * (dims[1] if len(dims) > 1 else 1)
        places.append(place(name, dims, 0, len(data)))
        numbers = struct.pack(f"<{count}f", *(0.1 * ((i * 7) % 11) - 0.5 for i in range(count)))
        data += numbers + b"\0" * (-len(numbers) % 32)
    return Maker(list(SETTINGS), places, data)
