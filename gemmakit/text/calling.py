"""Calling a tokenizer: texts and pairs to rows of ids, cut, padded and stacked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemmakit.errors import InputError
from gemmakit.text.encoding import (
    PADDINGS,
    SIDES,
    TRUNCATIONS,
    BatchEncoding,
    Part,
    Row,
    all_windows,
    columns,
    one_of,
    pad_row,
    round_up,
    shares,
    to_lists,
)
from gemmakit.text.vocabulary import Engine

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class _Limits:
    """Truncation and padding after defaults are settled. `None` for a length means no limit."""

    truncation: str
    padding: str
    max_length: int | None
    stride: int
    multiple: int | None
    side: str


class Calling:
    """`tokenizer(...)`, `encode`, `tokenize`, `pad`, and the special tokens around a sequence."""

    _engine: Engine
    _add_bos_token: bool
    _add_eos_token: bool
    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any
    pad_token_type_id: int
    padding_side: str
    truncation_side: str
    model_max_length: int
    model_input_names: list[str]
    split_special_tokens: bool

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encode a text, a pair, or a batch of either.

        text, text_pair: a string, or a list of B strings; a list may also hold pairs. With `is_split_into_words`, a
        list of words in place of each string. text_target is encoded the same way into `labels`.
        padding: True or "longest", "max_length", False. truncation: True or "longest_first", "only_first",
        "only_second", False. max_length: in tokens, special tokens included; None means `model_max_length`.
        return_overflowing_tokens: what is cut makes further rows, which share `stride` tokens with those before them.
        return_tensors: "pt", "np", "jax": tensors of shape (B, S), B = 1 for one text. Otherwise lists.
        return_offsets_mapping: (start, stop) character positions of each token (GemmaTokenizerFast).
        split_special_tokens: encode `<bos>`, `<start_of_turn>`, ... inside the text as ordinary characters.

        A text that already starts with the BOS token does not get a second one. Raises InputError for arguments that do
        not fit together, TokenizerError for text that cannot be encoded.
        """
        if text is None:
            if text_target is None:
                raise InputError("there is nothing to encode: text and text_target are both None.")
            text, text_pair, text_target = text_target, text_pair_target, None
        options = {key: value for key, value in locals().items() if key in DEFAULTS}
        result = self._call(text, text_pair, **options)
        if text_target is not None:
            result["labels"] = self._call(text_target, text_pair_target, **options)["input_ids"]
        return result

    def _call(self, text: Any, text_pair: Any, **options: Any) -> BatchEncoding:
        pairs, batched = _pairs(text, text_pair, options["is_split_into_words"])
        plain = (
            self.split_special_tokens if options["split_special_tokens"] is None else options["split_special_tokens"]
        )
        parts = self._parts(pairs, options["is_split_into_words"], options["return_offsets_mapping"], plain)
        return self._finish(parts, batched, options)

    def _finish(
        self, parts: Sequence[tuple[Part, Part | None]], batched: bool, options: Mapping[str, Any]
    ) -> BatchEncoding:
        """Special tokens, truncation, padding and tensors for ids that are already there."""
        limits = self._limits(options)
        rows: list[Row] = []
        sources: list[int] = []
        for index, (first, second) in enumerate(parts):
            made = self._rows(first, second, limits, options)
            rows += made
            sources += [index] * len(made)
        if limits.max_length is None and options["verbose"]:
            self._warn_if_long(rows)
        return self._output(self._pad_rows(rows, limits), sources, batched, options)

    def _limits(self, options: Mapping[str, Any]) -> _Limits:
        padding, truncation, max_length = options["padding"], options["truncation"], options["max_length"]
        if max_length is not None and (type(max_length) is not int or max_length < 0):
            raise InputError(f"max_length is {max_length!r}; it must be a non-negative integer.")
        if truncation is None and max_length is not None and padding is False:
            truncation = True
        names: dict[Any, str] = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}
        truncation = one_of("truncation", names.get(truncation, truncation), TRUNCATIONS)
        padding = getattr(padding, "value", padding)
        kinds: dict[Any, str] = {True: "longest", False: "do_not_pad"}
        padding = one_of("padding", kinds.get(padding, padding), PADDINGS)
        if max_length is None and self.model_max_length < 10**20:
            max_length = self.model_max_length
        stride, multiple = options["stride"], options["pad_to_multiple_of"]
        if type(stride) is not int or stride < 0:
            raise InputError(f"stride is {stride!r}; it must be a non-negative integer.")
        if max_length is None:
            truncation = "do_not_truncate"
            padding = "do_not_pad" if padding == "max_length" else padding
        if padding != "do_not_pad":
            self._need_pad_token()
            round_up(0, multiple)
            if truncation != "do_not_truncate" and multiple and max_length is not None and max_length % multiple:
                raise InputError(f"max_length {max_length} is not a multiple of pad_to_multiple_of {multiple}.")
        cut = truncation != "do_not_truncate" or padding == "max_length"
        side = one_of("padding_side", options["padding_side"] or self.padding_side, SIDES)
        return _Limits(truncation, padding, max_length if cut else None, stride, multiple, side)

    def _need_pad_token(self) -> None:
        if self.pad_token_id is None:
            raise InputError("padding needs a pad token: set tokenizer.pad_token = tokenizer.eos_token, for example.")

    def _parts(self, pairs: Sequence[Pair], words: bool, offsets: bool, plain: bool) -> list[tuple[Part, Part | None]]:
        """Encode every text of the batch in one go and hand the results back in place."""
        sides = [side for pair in pairs for side in pair if side is not None]
        texts = [text for side in sides for text in (side if words else [side])]
        encoded = iter(self._encode_plain(texts, offsets) if plain else self._encode_texts(texts, offsets))

        def take(side: Any) -> Part | None:
            if side is None:
                return None
            return _joined([next(encoded) for _ in side]) if words else next(encoded)

        return [(take(first), take(second)) for first, second in pairs]  # type: ignore[misc]

    def _encode_texts(self, texts: Sequence[str], offsets: bool) -> list[Part]:
        if offsets:
            return [Part(ids, places) for ids, places in self._engine.encode_with_offsets(texts)]
        return [Part(ids) for ids in self._engine.encode(texts)]

    def _encode_plain(self, texts: Sequence[str], offsets: bool) -> list[Part]:
        """Encode with special tokens as ordinary text: each is cut after its first character, so that none is seen."""
        pattern = self._engine.added.special_starts
        return [self._encode_pieces(split_after(text, pattern), offsets) for text in texts]

    def _encode_pieces(self, pieces: Sequence[str], offsets: bool = False) -> Part:
        parts = self._encode_texts(pieces, offsets)
        moved, start = Part([], [] if offsets else None), 0
        for piece, part in zip(pieces, parts, strict=True):
            moved.ids += part.ids
            if moved.offsets is not None:
                moved.offsets += [(begin + start, end + start) for begin, end in part.offsets or ()]
            start += len(piece)
        return moved

    def _rows(self, first: Part, second: Part | None, limits: _Limits, options: Mapping[str, Any]) -> list[Row]:
        special = options["add_special_tokens"]
        if special and self._add_bos_token:
            first = self._without_bos(first)
            second = None if second is None else self._without_bos(second)
        if limits.truncation == "do_not_truncate" or limits.max_length is None:
            return [self._row(first, second, special)]
        budget = limits.max_length - (self.num_special_tokens_to_add(second is not None) if special else 0)
        if budget < 0:
            raise InputError(f"max_length {limits.max_length} does not even hold the special tokens; raise it.")
        if limits.stride and limits.stride >= budget:
            raise InputError(f"stride {limits.stride} must be below max_length minus special tokens, {budget}.")
        if options["return_overflowing_tokens"]:
            size = (len(first.ids), 0 if second is None else len(second.ids))
            keep = (budget, 0) if second is None else shares(*size, budget, limits.truncation)
            found = all_windows(first, second, keep, limits.stride, self.truncation_side)
            return [self._row(*parts, special) for parts in found]
        if second is None:
            if limits.truncation == "only_second" and len(first.ids) > budget:
                raise InputError("truncation='only_second' needs a second text; there is only one.")
            return [self._row(first.keep(budget, self.truncation_side), None, special)]
        keep = shares(len(first.ids), len(second.ids), budget, limits.truncation)
        kept = first.keep(keep[0], self.truncation_side), second.keep(keep[1], self.truncation_side)
        return [self._row(*kept, special)]

    def _without_bos(self, part: Part) -> Part:
        bos, count = self.bos_token_id, 0
        while bos is not None and count < len(part.ids) and part.ids[count] == bos:
            count += 1
        if count:
            self._warn_once(
                "bos",
                "the text already starts with the BOS token, so none is added: Gemma needs exactly one. "
                "For text from apply_chat_template(tokenize=False), pass add_special_tokens=False.",
            )
        return part.cut(count, len(part.ids)) if count else part

    def _warn_once(self, key: str, message: str) -> None:
        raise NotImplementedError

    def _row(self, first: Part, second: Part | None, special: bool) -> Row:
        row = Row([], [], [], None if first.offsets is None else [], None if first.words is None else [], first.learnt)
        before, after = self._around() if special else ([], [])
        for kind, part in enumerate((first, second)):
            if part is None:
                continue
            row.ids += [*before, *part.ids, *after]
            row.types += [kind] * (len(before) + len(part.ids) + len(after))
            row.special += [1] * len(before) + [0] * len(part.ids) + [1] * len(after)
            if row.offsets is not None:
                row.offsets += [(0, 0)] * len(before) + list(part.offsets or ()) + [(0, 0)] * len(after)
            if row.words is not None:
                row.words += [None] * len(before) + list(part.words or ()) + [None] * len(after)
        row.mask = [1] * len(row.ids)
        return row

    def _around(self) -> tuple[list[int], list[int]]:
        """Ids put before and after each sequence."""
        before = [self.bos_token_id] if self._add_bos_token and self.bos_token_id is not None else []
        after = [self.eos_token_id] if self._add_eos_token and self.eos_token_id is not None else []
        return before, after

    def _warn_if_long(self, rows: Sequence[Row]) -> None:
        longest = max(map(len, rows), default=0)
        if longest > self.model_max_length:
            self._warn_once("long", f"a sequence has {longest} tokens; the model was made for {self.model_max_length}.")

    def _pad_rows(self, rows: list[Row], limits: _Limits) -> list[Row]:
        if limits.padding == "do_not_pad" or not rows:
            return rows
        length = limits.max_length if limits.padding == "max_length" else max(map(len, rows))
        length = round_up(length or 0, limits.multiple)
        return [pad_row(row, length, limits.side, self.pad_token_id, self.pad_token_type_id) for row in rows]

    def _output(self, rows: list[Row], sources: list[int], batched: bool, options: Mapping[str, Any]) -> BatchEncoding:
        def wanted(option: str, name: str) -> bool:
            return name in self.model_input_names if options[option] is None else bool(options[option])

        out = BatchEncoding(input_ids=[row.ids for row in rows])
        if wanted("return_token_type_ids", "token_type_ids"):
            out["token_type_ids"] = [row.types for row in rows]
        if wanted("return_attention_mask", "attention_mask"):
            out["attention_mask"] = [row.mask for row in rows]
        if options["return_special_tokens_mask"]:
            out["special_tokens_mask"] = [row.special for row in rows]
        if options["return_offsets_mapping"]:
            out["offset_mapping"] = [row.offsets for row in rows]
        if rows and rows[0].learnt is not None:
            out["assistant_masks"] = [row.learnt for row in rows]
        if options["return_length"]:
            out["length"] = [len(row) for row in rows]
        if options["return_overflowing_tokens"]:
            out["overflow_to_sample_mapping"] = sources
        elif not batched and options["return_tensors"] is None:
            out = BatchEncoding((key, value[0]) for key, value in out.items())
        out._rows, out._spell = rows, self._engine.id_to_token
        return out.convert_to_tensors(options["return_tensors"])

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """The `input_ids` of `self(text, text_pair, **options)`."""
        return self(text, text_pair, **options)["input_ids"]

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """The older name of calling the tokenizer with one text."""
        return self(text, text_pair, **options)

    def batch_encode_plus(self, texts: Sequence[Any], **options: Any) -> BatchEncoding:
        """The older name of calling the tokenizer with a batch."""
        return self(list(texts), **options)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text by name; no special tokens around it unless asked for."""
        ids = self.encode(text, pair, add_special_tokens=add_special_tokens, **options)
        return [self._engine.id_to_token(index) for index in ids]  # type: ignore[misc]

    def prepare_for_model(
        self,
        ids: Sequence[int],
        pair_ids: Sequence[int] | None = None,
        *,
        return_tensors: Any = None,
        prepend_batch_axis: bool = False,
        **options: Any,
    ) -> BatchEncoding:
        """Special tokens, truncation and padding for ids that were encoded before; options as in calling the tokenizer.

        return_tensors gives (S,), or with prepend_batch_axis (1, S). Raises InputError for an option that there is not,
        and for characters' positions, which ids no longer have.
        """
        if unknown := options.keys() - DEFAULTS.keys():
            raise InputError(f"prepare_for_model has no option {', '.join(sorted(unknown))}.")
        if options.get("return_offsets_mapping"):
            raise InputError("return_offsets_mapping is True, but ids do not say where in a text they were: call the "
                             "tokenizer with the text.")  # fmt: skip
        parts = [(Part([*ids]), None if pair_ids is None else Part([*pair_ids]))]
        made = self._finish(parts, False, {**DEFAULTS, **options})
        return made.convert_to_tensors(return_tensors, prepend_batch_axis)

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: Any = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad what was encoded before: a dictionary of rows, or a list of dictionaries (as a collate function gets).

        Rows may be lists, arrays or tensors; `token_type_ids`, `special_tokens_mask` and `attention_mask` are padded
        with the ids, any other key must already fit.
        """
        data = columns(encoded_inputs) if isinstance(encoded_inputs, (list, tuple)) else dict(encoded_inputs)
        if "input_ids" not in data:
            raise InputError(f"pad needs input_ids; it was given {sorted(data)}.")
        single = not len(data["input_ids"]) or not hasattr(data["input_ids"][0], "__len__")
        values = {key: to_lists(value) for key, value in data.items()}
        if single:
            values = {key: [value] for key, value in values.items()}
        options = {"padding": padding, "truncation": False, "max_length": max_length, "stride": 0}
        limits = self._limits({**options, "pad_to_multiple_of": pad_to_multiple_of, "padding_side": padding_side})
        count = len(values["input_ids"])
        rows = [Row(ids, [0] * len(ids), [0] * len(ids)) for ids in values["input_ids"]]
        fields = {"token_type_ids": "types", "special_tokens_mask": "special", "attention_mask": "mask"}
        for key, name in fields.items():
            for row, given in zip(rows, values.get(key, ()), strict=False):
                setattr(row, name, given)
        rows = self._pad_rows(rows, limits)
        values["input_ids"] = [row.ids for row in rows]
        wants_mask = (
            "attention_mask" in self.model_input_names if return_attention_mask is None else return_attention_mask
        )
        for key, name in fields.items():
            if key in values or (key == "attention_mask" and wants_mask):
                values[key] = [getattr(row, name) for row in rows]
        if any(len(value) != count for value in values.values()):
            raise InputError(
                f"pad needs the same number of rows under every key: { {k: len(v) for k, v in values.items()} }."
            )
        if single:
            return BatchEncoding((key, value[0]) for key, value in values.items()).convert_to_tensors(return_tensors)
        return BatchEncoding(values).convert_to_tensors(return_tensors)

    # -- the special tokens around sequences of ids

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`bos A eos` or `bos A eos bos B eos`, with those tokens that the settings ask for."""
        before, after = self._around()
        first = [*before, *token_ids_0, *after]
        return first if token_ids_1 is None else [*first, *before, *token_ids_1, *after]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """0 for the first sequence and its special tokens, 1 for the second."""
        first = len(self.build_inputs_with_special_tokens(token_ids_0))
        second = 0 if token_ids_1 is None else len(self.build_inputs_with_special_tokens(token_ids_1))
        return [0] * first + [1] * second

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 where a special token is (or would be put around the ids), 0 elsewhere."""
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise InputError("ids that already have special tokens come as one sequence; token_ids_1 must be None.")
            special = set(self.all_special_ids)
            return [int(index in special) for index in to_lists(token_ids_0)]
        before, after = self._around()
        sequences = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [flag for ids in sequences for flag in [1] * len(before) + [0] * len(ids) + [1] * len(after)]

    all_special_ids: Any

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        before, after = self._around()
        return (len(before) + len(after)) * (2 if pair else 1)

    @property
    def max_len_single_sentence(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)


# What calling a tokenizer means when only the text is given.
DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(Calling.__call__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


def _pairs(text: Any, text_pair: Any, words: bool) -> tuple[list[Pair], bool]:
    """The batch as (first, second or None), and whether a batch was given."""
    batched = isinstance(text, (list, tuple)) and (not words or bool(text and isinstance(text[0], (list, tuple))))
    if not batched:
        _check(text, words)
        if text_pair is not None:
            _check(text_pair, words)
        return [(text, text_pair)], False
    if text_pair is None:
        pairs = [_pair(item, words) for item in text]
    elif not isinstance(text_pair, (list, tuple)) or len(text_pair) != len(text):
        found = len(text_pair) if isinstance(text_pair, (list, tuple)) else type(text_pair).__name__
        raise InputError(f"text is a batch of {len(text)}, so text_pair must be one too; found {found}.")
    else:
        pairs = list(zip(text, text_pair, strict=True))
    for pair in pairs:
        for side in pair:
            if side is not None:
                _check(side, words)
    return pairs, True


def _pair(item: Any, words: bool) -> Pair:
    """An item of a batch: a text, or a pair of texts."""
    is_pair = isinstance(item, (list, tuple)) and len(item) == 2
    if is_pair and all(isinstance(side, (list, tuple) if words else str) for side in item):
        return item[0], item[1]
    return item, None


def _check(side: Any, words: bool) -> None:
    good = (
        isinstance(side, str)
        if not words
        else isinstance(side, (list, tuple)) and all(isinstance(w, str) for w in side)
    )
    if not good:
        expected = "a list of words" if words else "a string"
        hint = "; for words pass is_split_into_words=True" if isinstance(side, (list, tuple)) and not words else ""
        raise InputError(f"each text must be {expected}, found {type(side).__name__}{hint}.")


def _joined(parts: Sequence[Part]) -> Part:
    whole = Part([], [] if parts and parts[0].offsets is not None else None, [])
    for word, part in enumerate(parts):
        whole.ids += part.ids
        whole.words += [word] * len(part.ids)  # type: ignore[operator]
        if whole.offsets is not None:
            whole.offsets += part.offsets or []
    return whole


def split_after(text: str, starts: re.Pattern[str]) -> list[str]:
    """`text` cut one character after every place that `starts` matches."""
    cuts = [match.start() + 1 for match in starts.finditer(text)]
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
