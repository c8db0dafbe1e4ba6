"""text-classification and token-classification: the labels of a text or a pair of texts, the entities of a text."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch

from gemmakit.auto import AutoModelForSequenceClassification, AutoModelForTokenClassification
from gemmakit.checks import Whole, check
from gemmakit.errors import InputError, NumericalError, PromptTooLong
from gemmakit.pipelines.base import Pipeline, Record, evaluating, is_flax, padded
from gemmakit.text.vocabulary import shown

# Their frequencies depend on how long the padded batch is, and so on the other rows.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class ClassificationPipeline(Pipeline):
    """A pipeline whose model scores labels; a loaded one without labels is refused."""

    def __init__(self, model: Any, tokenizer: Any, **options: Any):
        if is_flax(model) or not isinstance(getattr(model, "num_labels", None), int):
            raise InputError(f"{self.task} needs a PyTorch model with labels; {type(model).__name__} is none.")
        super().__init__(model, tokenizer, **options)

    def context(self, max_length: int | None = None) -> int:
        """Tokens that a row may have, special ones included: what the model, its tokenizer and the call allow."""
        limits = (max_length, self.model.config.max_position_embeddings, self.tokenizer.model_max_length)
        return min(limit for limit in limits if limit is not None)

    def cut_or_refuse(self, lengths: Sequence[int], limit: int, truncation: Any, remedy: str = "") -> bool:
        """Whether rows of these lengths must be cut to `limit`; says so unless `truncation` asked for it.

        Raises PromptTooLong for truncation=False.
        """
        long = [(place, length) for place, length in enumerate(lengths) if length > limit]
        if not long:
            return False
        place, length = long[0]
        more = f" (and {len(long) - 1} more)" if len(long) > 1 else ""
        what = f"text {place} of this batch{more} has {length} tokens, but {limit} are the limit"
        if truncation in (False, "do_not_truncate"):
            raise PromptTooLong(f"{what}. Shorten it, or pass truncation=True.")
        if truncation is None:
            warnings.warn(
                f"{what}: the rest is not read. {remedy or 'Pass truncation=True.'}", UserWarning, stacklevel=6
            )
        return True

    def logits(self, rows: Sequence[list[int]]) -> list[torch.Tensor]:
        """What the model gives each row, in float32 on the CPU: (C,), or (P, C) with P of the longest row beside it."""
        out: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for members in self._together(rows):
            # On the right: there padding moves no token to another position.
            ids, mask = padded([rows[i] for i in members], self.tokenizer.pad_token_id or 0, self.device, "right")
            with torch.no_grad(), evaluating(self.model):
                found = self.model(ids, attention_mask=mask, use_cache=False, return_dict=True).logits.float().cpu()
            for i, row in zip(members, found, strict=True):
                out[i] = row if row.dim() == 1 else row[: len(rows[i])]
        if not all(bool(row.isfinite().all()) for row in out):
            raise NumericalError(f"{self.task}: the model's scores are not finite. Try dtype=torch.float32.")
        return out

    def _together(self, rows: Sequence[list[int]]) -> list[list[int]]:
        """The places of rows that can share a forward pass without changing each other's result."""
        rope: Mapping[str, Any] = self.model.config.rope_parameters or {}
        if not rows or rope.get("rope_type") not in LENGTH_DEPENDENT_ROPE:
            return [list(range(len(rows)))] if rows else []
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(len(row), []).append(i)
        return list(groups.values())

    def label(self, index: int) -> str:
        """The name of a label's number."""
        return self.model.config.id2label[index]


Text = str | Mapping[str, str]

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}
# top_k=1 gives a list of one label; no top_k at all gives the label itself.
UNSET: Any = object()


class TextClassificationPipeline(ClassificationPipeline):
    """Labels texts, and pairs of texts given as {"text": ..., "text_pair": ...}.

    A result is {"label": name, "score": number} of the best label; with `top_k`, a list of them, the best first. A
    single string without `top_k` in its call gives its result inside a list, as transformers does.

    Arguments of a call:
        top_k: how many labels; None for all.
        function_to_apply: "softmax", "sigmoid" or "none"; None takes "none" for regression, "sigmoid" for a single
            label or several at once, and "softmax" otherwise (`config.problem_type`, `config.num_labels`).
        truncation: what is longer than the context is cut, and a warning says so; True cuts without a warning, False
            raises PromptTooLong.
        max_length: a limit below the context's.
        padding: accepted, and without effect: rows do not depend on it.
        return_all_scores: True is the older name of top_k=None.
    """

    task = "text-classification"
    takes = "a text or a pair {'text': ..., 'text_pair': ...}"
    model_class = AutoModelForSequenceClassification

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        result = super().__call__(inputs, batch_size=batch_size, **options)
        return [result] if isinstance(inputs, str) and "top_k" not in options else result

    def is_one(self, inputs: Any) -> bool:
        if isinstance(inputs, Mapping):
            return {"text"} <= set(inputs) <= {"text", "text_pair"} and all(isinstance(t, str) for t in inputs.values())
        return isinstance(inputs, str)

    def run(
        self,
        batch: Sequence[Text],
        *,
        top_k: int | None = UNSET,
        function_to_apply: str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding: bool | str | None = None,
        return_all_scores: bool | None = None,
    ) -> list[Any]:
        """The results of a batch, in its order; the options are described at the class."""
        if return_all_scores:
            if top_k not in (UNSET, None):
                raise InputError(
                    f"top_k is {top_k}, but return_all_scores asks for the scores of all: give one of them."
                )
            top_k = None
        _check_top_k(top_k)
        self._function(function_to_apply)
        found = self.logits(self._rows(batch, truncation, max_length))
        if found and found[0].dim() != 1:
            raise InputError(f"{self.task} needs one score a label; {type(self.model).__name__} scores every token.")
        chosen: dict[str, Any] = dict(top_k=top_k, function_to_apply=function_to_apply)
        return [self.postprocess({"logits": logits[None]}, **chosen) for logits in found]

    def preprocess(
        self, inputs: Text, *, truncation: bool | str | None = None, max_length: int | None = None
    ) -> Record:
        """input_ids and attention_mask, (1, S)."""
        return self.model_inputs(self._rows([inputs], truncation, max_length)[0])

    def forward(self, model_inputs: Mapping[str, torch.Tensor]) -> Record:
        """logits, (1, C)."""
        return {"logits": self.logits([model_inputs["input_ids"][0].tolist()])[0][None]}

    def postprocess(
        self,
        model_outputs: Mapping[str, torch.Tensor],
        *,
        top_k: int | None = UNSET,
        function_to_apply: str | None = None,
    ) -> Any:
        """A label, or with `top_k` a list of them."""
        _check_top_k(top_k)
        ranked = self._ranked(self._function(function_to_apply)(model_outputs["logits"][0]))
        return ranked[0] if top_k is UNSET else ranked[:top_k]

    def _rows(self, batch: Sequence[Text], truncation: Any, max_length: int | None) -> list[list[int]]:
        texts = [(t, None) if isinstance(t, str) else (t["text"], t.get("text_pair")) for t in batch]
        limit = self.context(max_length)

        def encode(text: str, pair: str | None, **options: Any) -> list[int]:
            return list(self.tokenizer(text, pair, verbose=False, **options)["input_ids"])

        rows = [encode(*text, truncation=False) for text in texts]
        if not self.cut_or_refuse([len(row) for row in rows], limit, truncation):
            return rows
        cut = truncation or True
        return [
            row if len(row) <= limit else encode(*text, truncation=cut, max_length=limit)
            for row, text in zip(rows, texts, strict=True)
        ]

    def _function(self, name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
        if name is None:
            config = self.model.config
            several = config.problem_type == "multi_label_classification" or config.num_labels == 1
            name = "none" if config.problem_type == "regression" else "sigmoid" if several else "softmax"
        function = FUNCTIONS.get(str(name).lower())
        if function is None:
            raise InputError(f"function_to_apply is {name!r}; it must be {', '.join(map(repr, FUNCTIONS))} or None.")
        return function

    def _ranked(self, scores: torch.Tensor) -> list[Record]:
        """Every label, the best first. scores: (C,)."""
        labels: list[Record] = [
            {"label": self.label(i), "score": score} for i, score in enumerate(cast("list[float]", scores.tolist()))
        ]
        return sorted(labels, key=lambda label: -label["score"])


def _check_top_k(top_k: Any) -> None:
    if top_k is not UNSET and top_k is not None:
        check("top_k", top_k, Whole(1), InputError)


class TokenClassificationPipeline(ClassificationPipeline):
    """Labels the tokens of texts, or finds the entities they make up.

    A result is a list of {"entity", "score", "index", "word", "start", "end"}, one a token; with another
    aggregation_strategy than "none" of {"entity_group", "score", "word", "start", "end"}, one an entity. start and end
    are characters of the text, from the fast tokenizer (None from the slow one).

    Arguments of a call:
        aggregation_strategy: "none"; "simple" joins neighbours of one tag, where B- begins a new entity and
            the bytes of a character count as one token, of their averaged probabilities; "first",
            "average" and "max" first give each word one label: that of its first token, of its tokens' averaged
            probabilities, of its most certain token. Words are what spaces divide. The three need the fast tokenizer.
        ignore_labels: what to leave out; ["O"] unless said.
        stride: read all of a text longer than the context, in windows that share this many tokens; where they disagree
            the longer entity stays, then the likelier. Not with "none".
        truncation: without stride, what is longer than the context is cut, and a warning says so; True cuts without a
            warning, False raises PromptTooLong.
        grouped_entities: the older way to say "simple", or "first" with ignore_subwords; False says "none".
    """

    task = "token-classification"
    takes = "a text"
    model_class = AutoModelForTokenClassification

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, str)

    def run(
        self,
        batch: Sequence[str],
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] | None = None,
        stride: int | None = None,
        truncation: bool | None = None,
        grouped_entities: bool | None = None,
        ignore_subwords: bool | None = None,
    ) -> list[list[Record]]:
        """The results of a batch, in its order; the options are described at the class."""
        if grouped_entities is not None or ignore_subwords is not None:
            if aggregation_strategy != "none":
                raise InputError(
                    f"aggregation_strategy is {aggregation_strategy!r}, which says what grouped_entities and "
                    "ignore_subwords say in older words: give it alone."
                )
            grouped = "first" if ignore_subwords else "simple"
            aggregation_strategy = grouped if grouped_entities else "none"
        strategy = self._strategy(aggregation_strategy, stride)
        encoded = self._encode(batch, stride, truncation)
        encoded["scores"] = self._probabilities(encoded["input_ids"], len(batch))
        return self._entities(batch, encoded, strategy, ignore_labels)

    def preprocess(self, inputs: str, *, stride: int | None = None, truncation: bool | None = None) -> Record:
        """The text and its rows: lists of `input_ids` and what is known of each token, one of each a window."""
        return {"text": inputs, **self._encode([inputs], stride, truncation)}

    def forward(self, model_inputs: Mapping[str, Any]) -> Record:
        """The same with `scores`, the probabilities (P, C) of each window's tokens."""
        return {**model_inputs, "scores": self._probabilities(model_inputs["input_ids"], 1)}

    def postprocess(
        self,
        model_outputs: Mapping[str, Any],
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] | None = None,
    ) -> list[Record]:
        """The entities of the text."""
        strategy = self._strategy(aggregation_strategy, None)
        encoded = {name: value for name, value in model_outputs.items() if name != "text"}
        return self._entities([model_outputs["text"]], encoded, strategy, ignore_labels)[0]

    def _entities(
        self, batch: Sequence[str], encoded: Mapping[str, list[Any]], strategy: str, ignore_labels: Any
    ) -> list[list[Record]]:
        """Those of each text, from windows of scored tokens."""
        ignored = {"O"} if ignore_labels is None else set(ignore_labels)
        found: list[list[list[Record]]] = [[] for _ in batch]
        sources: list[int] = encoded["overflow_to_sample_mapping"]
        for window, source in enumerate(sources):
            row = {k: v[window] for k, v in encoded.items()}
            pieces = self._pieces(batch[source], row, row["scores"])
            entities = gather(pieces, strategy, self.model.config.id2label, self.tokenizer.convert_tokens_to_string)
            for entity in entities:
                if "\ufffd" in entity["word"] and entity["start"] is not None:  # a window began within a character
                    entity["word"] = batch[source][entity["start"] : entity["end"]]
            found[source].append([e for e in entities if e.get("entity", e.get("entity_group")) not in ignored])
        return [lay_over([*chain(*windows)]) if len(windows) > 1 else windows[0] for windows in found]

    def _strategy(self, name: Any, stride: int | None) -> str:
        strategy = str(getattr(name, "value", name)).lower()
        if strategy not in STRATEGIES:
            raise InputError(f"aggregation_strategy is {name!r}; it must be {', '.join(map(repr, STRATEGIES))}.")
        if not self.tokenizer.is_fast and (strategy in WORDWISE or stride is not None):
            what = "stride" if stride is not None else f"aggregation_strategy={strategy!r}"
            raise InputError(f"{what} needs the fast tokenizer, which knows where in the text a token is.")
        if stride is not None and strategy == "none":
            raise InputError("stride joins windows by their entities: pass an aggregation_strategy, such as 'simple'.")
        return strategy

    def _encode(self, batch: Sequence[str], stride: int | None, truncation: bool | None) -> dict[str, list[Any]]:
        """Rows of ids, with offsets, a mask of special tokens, and the place of the text that each row is of."""
        limit = self.context()
        options = dict(
            return_offsets_mapping=self.tokenizer.is_fast, return_special_tokens_mask=True, verbose=False,
            return_overflowing_tokens=True, max_length=limit,
        )  # fmt: skip
        if stride is not None:
            return self.tokenizer(list(batch), truncation=True, stride=stride, **options)
        rows = self.tokenizer(list(batch), truncation=False, **options)
        lengths = [len(row) for row in rows["input_ids"]]
        if self.cut_or_refuse(
            lengths, limit, truncation, "Pass stride= and a strategy to read all, or truncation=True."
        ):
            kept = options | {"return_overflowing_tokens": False}
            rows = self.tokenizer(list(batch), truncation=True, **kept)
            rows["overflow_to_sample_mapping"] = list(range(len(batch)))
        return rows

    def _probabilities(self, rows: Sequence[list[int]], size: int) -> list[torch.Tensor]:
        """(P, C) for each row, `size` rows at a time: a long text has more windows than a batch has texts."""
        found: list[torch.Tensor] = []
        for start in range(0, len(rows), size):
            found += self.logits(rows[start : start + size])
        if found and found[0].dim() != 2:
            raise InputError(
                f"{self.task} needs scores of every token; {type(self.model).__name__} scores whole texts."
            )
        return [logits.softmax(-1) for logits in found]

    def _pieces(self, text: str, row: dict[str, Any], scores: torch.Tensor) -> list[Piece]:
        """The tokens of a row that are text, with where they are in it."""
        pieces: list[Piece] = []
        for index, (token, special) in enumerate(zip(row["input_ids"], row["special_tokens_mask"], strict=True)):
            if special:
                continue
            piece = Piece(
                self.tokenizer.convert_ids_to_tokens(token),
                cast("list[float]", scores[index].tolist()),
                index,
                None,
                None,
            )
            piece.within = bool(pieces) and _inside_character(pieces[-1].word, piece.word)
            if self.tokenizer.is_fast:
                piece.start, piece.stop = row["offset_mapping"][index]
                piece.continues = piece.within or continues_word(text, row["offset_mapping"][index][0])
                if token == self.tokenizer.unk_token_id:
                    piece.word, piece.continues = text[piece.start : piece.stop], False
            pieces.append(piece)
        return pieces


# -- from a label a token to entities; no model is known here ----------------------------------------------------------

Join = Callable[[list[str]], str]  # tokens -> the text they spell

STRATEGIES = ("none", "simple", "first", "average", "max")
WORDWISE = ("first", "average", "max")


@dataclass
class Piece:
    """A token, or a word of several. start, stop: characters of the text, None without offsets."""

    word: str
    scores: list[float]  # (C,) probabilities
    index: int
    start: int | None
    stop: int | None
    continues: bool = False  # the word of the token before it
    within: bool = False  # the character of the token before it, as bytes do

    @property
    def best(self) -> int:
        """The number of the likeliest label; of equals the first."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    @property
    def score(self) -> float:
        return self.scores[self.best]


def continues_word(text: str, start: int) -> bool:
    """Whether a token at `start` is inside a word. Words are what spaces divide: the vocabulary marks nothing else."""
    return start > 0 and " " not in text[start - 1 : start + 1]


def _inside_character(before: str, token: str) -> bool:
    """Whether a token is a byte of the character that the token before it began."""
    first, value = shown(before), shown(token)
    return isinstance(first, int) and isinstance(value, int) and 0x80 <= value < 0xC0


def gather(pieces: Sequence[Piece], strategy: str, labels: dict[int, str], join: Join) -> list[dict[str, Any]]:
    """The entities of one text. "none": one a token; "simple": runs of tokens with one tag; the others: runs of words,
    each with the label of its first token, of its tokens' averaged probabilities, or of its most certain token.
    """
    if strategy == "none":
        return [
            {
                "entity": labels[p.best],
                "score": p.score,
                "index": p.index,
                "word": p.word,
                "start": p.start,
                "end": p.stop,
            }
            for p in pieces
        ]
    if strategy in WORDWISE:
        whole = [_word(group, strategy, join) for group in _groups(pieces, "continues")]
    else:  # a character is the smallest thing that a label can be of
        whole = [_word(group, "average", join) if group[1:] else group[0] for group in _groups(pieces, "within")]
    return [_entity(run, labels, join) for run in _runs(whole, labels)]


def _groups(pieces: Sequence[Piece], joined: str) -> list[list[Piece]]:
    """Neighbours that belong together. joined: the field that says so of a token and the one before it."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        if groups and getattr(piece, joined):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _word(pieces: Sequence[Piece], strategy: str, join: Join) -> Piece:
    """The tokens of a word as one piece with the probabilities that `strategy` gives it."""
    if strategy == "first":
        scores = pieces[0].scores
    elif strategy == "max":
        scores = max(pieces, key=lambda piece: piece.score).scores
    else:
        scores = [sum(column) / len(pieces) for column in zip(*(p.scores for p in pieces), strict=True)]
    return Piece(join([p.word for p in pieces]), scores, pieces[0].index, pieces[0].start, pieces[-1].stop)


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and of what kind: "B-PER", "I-PER", or a bare "PER", which goes on."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label


def _runs(pieces: Sequence[Piece], labels: dict[int, str]) -> list[list[Piece]]:
    runs: list[list[Piece]] = []
    last = None
    for piece in pieces:
        begins, tag = _tag(labels[piece.best])
        if runs and tag == last and not begins:
            runs[-1].append(piece)
        else:
            runs.append([piece])
        last = tag
    return runs


def _entity(run: Sequence[Piece], labels: dict[int, str], join: Join) -> dict[str, Any]:
    return {
        # Whatever stands before the first hyphen is a prefix here, as it is in transformers.
        "entity_group": labels[run[0].best].split("-", 1)[-1],
        "score": sum(piece.score for piece in run) / len(run),
        "word": join([piece.word for piece in run]),
        "start": run[0].start,
        "end": run[-1].stop,
    }


def lay_over(entities: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entities of overlapping windows, in the order of the text: of two that begin within one another the longer one
    stays, of equally long ones the likelier.
    """
    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda e: e["start"]):
        if not kept or entity["start"] >= kept[-1]["end"] or entity["start"] < kept[-1]["start"]:
            kept.append(entity)
        elif (_length(entity), entity["score"]) > (_length(kept[-1]), kept[-1]["score"]):
            kept[-1] = entity
    return kept


def _length(entity: dict[str, Any]) -> int:
    return entity["end"] - entity["start"]
