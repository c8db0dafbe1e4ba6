"""What a tokenizer returns, and the arithmetic of truncating, padding and stacking rows of ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from gemmakit.errors import InputError, MissingDependency
from gemmakit.text.vocabulary import Offsets

TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
PADDINGS = ("longest", "max_length", "do_not_pad")
SIDES = ("left", "right")


class BatchEncoding(dict[str, Any]):
    """A dictionary of `input_ids`, `attention_mask`, ... whose entries are attributes too.

    Values are lists of int (one text), lists of lists (a batch), or tensors of shape (B, S). `model(**inputs)`,
    `model.generate(**inputs)`, `inputs["input_ids"]` and `inputs.input_ids` all work.
    """

    _rows: list[Row] | None = None
    _spell: Callable[[int], str | None] | None = None

    def __init__(
        self,
        data: Any = (),
        encoding: None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        **columns: Any,
    ) -> None:
        """data: a mapping or pairs; columns: more of it. The rest is as in `convert_to_tensors`."""
        if encoding is not None:
            raise InputError("encoding is given, but where tokens come from is known to what a tokenizer gave alone.")
        super().__init__(() if data is None else data, **columns)
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {sorted(self)}.") from None

    @property
    def data(self) -> dict[str, Any]:
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Move the PyTorch tensors to a device, in place; everything else stays. Returns itself."""
        for key, value in self.items():
            if hasattr(value, "to") and hasattr(value, "device"):
                self[key] = value.to(device, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: str | None, prepend_batch_axis: bool = False) -> BatchEncoding:
        """Turn the lists into tensors of kind "pt", "np" or "jax", in place. Raises InputError for ragged rows."""
        if tensor_type is not None:
            make = tensor_maker(tensor_type)
            for key, value in self.items():
                self[key] = make(key, [value] if prepend_batch_axis else value)
        return self

    # -- where tokens come from: rows by `batch_index`, or the first where only a token, word or character is given

    @property
    def n_sequences(self) -> int | None:
        """Texts a row: 2 for pairs; None for what no tokenizer made."""
        return None if not self._rows else 1 + any(kind for row in self._rows for kind in row.types)

    @property
    def is_fast(self) -> bool:
        """Whether it knows the characters of its tokens: GemmaTokenizerFast, with return_offsets_mapping=True."""
        return bool(self._rows) and self._row(0).offsets is not None

    @property
    def encodings(self) -> list[Row] | None:
        """The rows: `ids`, `types`, `special`, `mask`, and `offsets` and `words` where they are known."""
        return self._rows

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as the vocabulary writes them."""
        row = self._row(batch_index)
        if self._spell is None:
            raise InputError("this BatchEncoding was pickled or copied without its tokenizer: ask that for the tokens.")
        return [self._spell(index) or "" for index in row.ids]

    def __getstate__(self) -> dict[str, Any]:
        return {"_rows": self._rows}  # a tokenizer is not part of what it gave

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The word of each token, for input given with `is_split_into_words=True`; None for special tokens."""
        words = self._row(batch_index).words if self._rows else None
        if words is None:
            raise InputError("word_ids needs input that was given as words, with is_split_into_words=True.")
        return words

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 for tokens of the first text, 1 for those of the second, None for special tokens and padding."""
        row = self._row(batch_index)
        return [None if special else kind for special, kind in zip(row.special, row.types, strict=True)]

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Which text a token is of."""
        batch, token = _place(batch_or_token_index, token_index)
        return self.sequence_ids(batch)[token]

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Which word a token is of."""
        batch, token = _place(batch_or_token_index, token_index)
        return self.word_ids(batch)[token]

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters of its text that a token is; None for special tokens."""
        batch, token = _place(batch_or_token_index, token_index)
        return None if self._row(batch).special[token] else CharSpan(*self._offsets(batch)[token])

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The first token that a character of a text is in; None where it is in none, cut off for instance."""
        batch, char = _place(batch_or_char_index, char_index)
        places = zip(self.sequence_ids(batch), self._offsets(batch), strict=True)
        found = (i for i, (text, (start, stop)) in enumerate(places) if text == sequence_index and start <= char < stop)
        return next(found, None)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word, first and one after the last; None for a word without tokens."""
        batch, word = _place(batch_or_word_index, word_index)
        texts = zip(self.sequence_ids(batch), self.word_ids(batch), strict=True)
        found = [i for i, pair in enumerate(texts) if pair == (sequence_index, word)]
        return TokenSpan(found[0], found[-1] + 1) if found else None

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Which word the first token at a character is of."""
        batch, char = _place(batch_or_char_index, char_index)
        token = self.char_to_token(batch, char, sequence_index)
        return None if token is None else self.token_to_word(batch, token)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word, in the word itself, as its tokens cover them."""
        batch, word = _place(batch_or_word_index, word_index)
        tokens = self.word_to_tokens(batch, word, sequence_index)
        if tokens is None:
            return None
        offsets = self._offsets(batch)
        return CharSpan(offsets[tokens.start][0], offsets[tokens.end - 1][1])

    def _row(self, batch_index: int) -> Row:
        if not self._rows:
            raise InputError("this BatchEncoding was not made by a tokenizer's call: it knows its entries alone.")
        return self._rows[batch_index]

    def _offsets(self, batch_index: int) -> Offsets:
        offsets = self._row(batch_index).offsets
        if offsets is None:
            raise InputError(
                "characters need return_offsets_mapping=True in the call of the tokenizer, of GemmaTokenizerFast."
            )
        return offsets


class CharSpan(NamedTuple):
    """Characters start to end, the last not included."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens start to end, the last not included."""

    start: int
    end: int


def _place(batch_or_index: int, index: int | None) -> tuple[int, int]:
    return (0, batch_or_index) if index is None else (batch_or_index, index)


@dataclass
class Row:
    """One sequence on its way out; all lists have the same length."""

    ids: list[int]
    types: list[int]
    special: list[int]
    offsets: Offsets | None = None
    words: list[int | None] | None = None
    learnt: list[int] | None = None  # 1 where the assistant speaks
    mask: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mask = self.mask or [1] * len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Part:
    """The ids of one text (or of one list of words) before special tokens."""

    ids: list[int]
    offsets: Offsets | None = None
    words: list[int | None] | None = None
    learnt: list[int] | None = None

    def cut(self, start: int, stop: int) -> Part:
        lists = (None if held is None else held[start:stop] for held in (self.offsets, self.words, self.learnt))
        return Part(self.ids[start:stop], *lists)  # type: ignore[arg-type]

    def keep(self, count: int, side: str) -> Part:
        """The first (`side="right"` is cut) or last `count` ids."""
        size = len(self.ids)
        return self.cut(0, count) if side == "right" else self.cut(max(0, size - count), size)


def windows(size: int, length: int, stride: int, side: str) -> list[tuple[int, int]]:
    """(start, stop) of windows of `length` that share `stride` ids with their neighbour, the kept one first."""
    if size <= length:
        return [(0, size)]
    if length == 0:
        return [(0, 0)]
    found = []
    for step in range(0, size, length - stride):
        if side == "right":
            start, stop = step, min(step + length, size)
            last = stop == size
        else:
            start, stop = max(0, size - step - length), size - step
            last = start == 0
        found.append((start, stop))
        if last:
            break
    return found


def all_windows(
    first: Part, second: Part | None, lengths: tuple[int, int], stride: int, side: str
) -> Iterator[tuple[Part, Part | None]]:
    """Of a text or a pair, windows of `lengths` ids: each of the first text beside each of the second, kept ones first.

    Raises InputError for a stride that leaves no way forward.
    """

    def cut(part: Part, length: int) -> list[Part]:
        if length < len(part.ids) and stride >= max(length, 1):
            raise InputError(f"stride {stride} must be below the {length} ids that a window has of a text.")
        return [part.cut(*span) for span in windows(len(part.ids), length, stride, side)]

    others: list[Part | None] = [None] if second is None else [*cut(second, lengths[1])]
    one, *rest = cut(first, lengths[0])
    yield one, others[0]
    yield from ((part, other) for part in rest for other in others)
    yield from ((one, other) for other in others[1:])


def shares(first: int, second: int, budget: int, strategy: str) -> tuple[int, int]:
    """How many ids of each of a pair fit `budget` together. Raises InputError if one may not shrink enough."""
    excess = first + second - budget
    if excess <= 0:
        return first, second
    if strategy == "only_first":
        return _remaining(first, excess, "first", budget), second
    if strategy == "only_second":
        return first, _remaining(second, excess, "second", budget)
    small = min(first, second)
    if small > budget // 2:
        half, rest = budget // 2, budget - budget // 2
        return (half, rest) if first <= second else (rest, half)
    return (first, budget - first) if first <= second else (budget - second, second)


def _remaining(size: int, excess: int, which: str, budget: int) -> int:
    if size <= excess:
        raise InputError(
            f"the {which} text has {size} tokens and {excess} must go to leave {budget}. "
            "Use truncation='longest_first' or a larger max_length."
        )
    return size - excess


def pad_row(row: Row, length: int, side: str, pad_id: int, pad_type: int) -> Row:
    """`row` with padding up to `length`; mask 0, special 1, offsets (0, 0), no word."""
    missing = length - len(row)
    if missing <= 0:
        return row

    def joined(values: list[Any] | None, filler: Any) -> Any:
        if values is None:
            return None
        return [filler] * missing + values if side == "left" else values + [filler] * missing

    return replace(
        row,
        ids=joined(row.ids, pad_id),
        types=joined(row.types, pad_type),
        special=joined(row.special, 1),
        mask=joined(row.mask, 0),
        offsets=joined(row.offsets, (0, 0)),
        words=joined(row.words, None),
        learnt=joined(row.learnt, 0),
    )


def round_up(length: int, multiple: int | None) -> int:
    if multiple is None:
        return length
    if not isinstance(multiple, int) or multiple < 1:
        raise InputError(f"pad_to_multiple_of is {multiple!r}; it must be a positive integer.")
    return -(-length // multiple) * multiple


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")
    return value


def to_lists(value: Any) -> Any:
    """Tensors and arrays, also inside lists, as plain Python lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [to_lists(item) for item in value]
    return value


def tensor_maker(kind: Any) -> Any:
    """A function (name, nested lists) -> integer tensor: int64 for "pt" and "np", JAX's default for "jax"."""
    kind = getattr(kind, "value", kind)
    if kind == "pt":
        import torch

        return lambda name, value: value if torch.is_tensor(value) else _stack(name, value, _long(torch))
    if kind == "np":
        import numpy

        return lambda name, value: _stack(name, value, lambda rows: numpy.array(rows, dtype=numpy.int64))
    if kind == "jax":
        try:
            import jax.numpy  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingDependency("return_tensors='jax' needs jax: pip install 'gemmakit[flax]'.") from error
        return lambda name, value: _stack(name, value, lambda rows: jax.numpy.array(rows, dtype=int))
    raise InputError(f"return_tensors is {kind!r}; it must be 'pt', 'np' or 'jax'.")


def _long(torch: Any) -> Any:
    return lambda rows: torch.tensor(rows, dtype=torch.long)


def _stack(name: str, rows: Any, make: Any) -> Any:
    try:
        return make(to_lists(rows))
    except (ValueError, TypeError, RuntimeError) as error:
        lengths = sorted({len(row) for row in rows if isinstance(row, list)})
        raise InputError(
            f"{name} cannot become one tensor: its rows have lengths {lengths}. "
            "Pass padding=True (and truncation=True to shorten), or leave return_tensors out."
        ) from error


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A list of dictionaries as a dictionary of lists; all must have the keys of the first."""
    keys = list(rows[0])
    for index, row in enumerate(rows):
        if set(row) != set(keys):
            raise InputError(f"item {index} has the keys {sorted(row)}, the first has {sorted(keys)}.")
    return {key: [row[key] for row in rows] for key in keys}
