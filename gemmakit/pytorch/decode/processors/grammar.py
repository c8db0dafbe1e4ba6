"""Output that follows a JSON schema, a regular expression or a Lark grammar, through the llguidance library."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gemmakit.errors import GenerationConfigError, InputError, MissingDependency
from gemmakit.generation import GenerationConfig
from gemmakit.generation.constraints import JSON_BLANK
from gemmakit.pytorch.decode.processors.logits import FORBIDDEN
from gemmakit.pytorch.decode.token_bytes import Tokenizer, token_table

SETTINGS = ("json_schema", "regex", "grammar")
# A server is asked for the same shape many times over; each takes from milliseconds to a second to make ready.
_KEPT_SHAPES = 64
_engines: WeakKeyDictionary[Any, dict[Any, _Engine]] = WeakKeyDictionary()


def grammar_constraint(
    config: GenerationConfig, tokenizer: Tokenizer | None, vocabulary: int, prompt_length: int
) -> GrammarConstraint | None:
    """The processor for json_schema, regex or grammar; None when the settings ask for none of them.

    Raises MissingDependency without llguidance, InputError without a tokenizer or eos, GenerationConfigError for a
    schema, expression or grammar that it cannot read.
    """
    name = next((n for n in SETTINGS if getattr(config, n) is not None), None)
    if name is None:
        return None
    if tokenizer is None:
        raise InputError(f"{name} is about text: pass the tokenizer too, generate(..., tokenizer=...).")
    if not config.eos_token_ids:
        raise InputError(f"{name} needs a token to end with: set eos_token_id.")
    library = _library()
    engine = _engine(library, tokenizer, vocabulary, config.eos_token_ids[0])
    return GrammarConstraint(engine.matcher(library, name, getattr(config, name)), config.eos_token_ids, prompt_length)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as e:
        raise MissingDependency(
            "json_schema, regex and grammar need the llguidance package: pip install 'gemmakit[constrained]'"
        ) from e
    return llguidance


def _grammar(library: Any, name: str, value: Any) -> str:
    if name == "regex":
        return library.LLMatcher.grammar_from_regex(value)
    if name == "grammar":
        return library.LLMatcher.grammar_from_lark(value)
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps({} if schema is True else schema)
        return library.LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": JSON_BLANK})
    except (TypeError, ValueError) as e:
        raise GenerationConfigError(f"json_schema is no JSON: {e}") from e


@dataclass
class _Words:
    """What llguidance wants to know of a tokenizer."""

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    encode: Any
    bos_token_id: int | None = None

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        # A text that spells a special token is text: the grammar names tokens by their ids.
        return self.encode(text, add_special_tokens=False, split_special_tokens=True)


@dataclass
class _Engine:
    """A vocabulary as llguidance's prefix tree, and the shapes that were made ready for it last, each at its start."""

    tree: Any
    shapes: OrderedDict[str, Any] = field(default_factory=OrderedDict[str, Any])

    def matcher(self, library: Any, name: str, value: Any) -> Any:
        """Nobody may move it: it is copied. Raises GenerationConfigError."""
        grammar = _grammar(library, name, value)
        found = self.shapes.get(grammar)
        if found is None:
            found = library.LLMatcher(self.tree, grammar, log_level=0)
            if found.is_error():
                raise GenerationConfigError(f"{name} cannot be followed: {_said(found)}")
            self.shapes[grammar] = found
            while len(self.shapes) > _KEPT_SHAPES:
                self.shapes.popitem(last=False)
        return found


def _engine(library: Any, tokenizer: Tokenizer, vocabulary: int, eos: int) -> _Engine:
    """The engine of a vocabulary; about a second for Gemma's, so it is kept beside the tokenizer."""
    table, special = token_table(tokenizer, vocabulary)
    kept = _engines.setdefault(tokenizer, {})
    key = (vocabulary, eos, id(table))  # the table is another one when tokens were added
    if key not in kept:
        specials = sorted(i for i in special | {eos} if i < vocabulary)
        words = _Words(table, specials, eos, tokenizer.encode)
        kept.clear()
        kept[key] = _Engine(library.LLTokenizer(library.TokenizerWrapper(words), n_vocab=vocabulary))
    return kept[key]


@dataclass
class _Row:
    """How far one row has come in the grammar."""

    matcher: Any
    tokens: list[int] = field(default_factory=list)

    def follow(self, tokens: list[int]) -> None:
        """Take back what differs (beams change places, drafts are refused) and go on. Raises InputError."""
        pairs = zip(self.tokens, tokens, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.tokens), len(tokens)))
        if common < len(self.tokens):
            self.matcher.rollback(len(self.tokens) - common)
        if common < len(tokens) and not self.matcher.consume_tokens(tokens[common:]):
            raise InputError(
                f"token {tokens[-1]} leaves the grammar at new token {len(tokens)}: another processor or a forced "
                f"token contradicts it ({_said(self.matcher)})."
            )
        self.tokens = tokens


@dataclass
class GrammarConstraint:
    """Forbids every token that the grammar cannot go on with; when it is complete, all but eos.

    Rows go on each for itself. The matcher runs on the host, so every step waits for the device.
    """

    start: Any
    eos: Sequence[int]
    prompt_length: int
    _rows: list[_Row] = field(default_factory=list)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        while len(self._rows) < ids.shape[0]:
            self._rows.append(_Row(self.start.deep_copy()))
        new = ids[:, self.prompt_length :].tolist()
        may = [self._allowed(row, tokens, scores.shape[-1]) for row, tokens in zip(self._rows, new, strict=False)]
        return scores.masked_fill(~torch.stack(may).to(scores.device), FORBIDDEN)

    def _allowed(self, row: _Row, tokens: list[int], vocabulary: int) -> Tensor:
        """bool (V,): what may come after these new tokens; anything after the end, which is padding."""
        if any(token in self.eos for token in tokens):
            return torch.ones(vocabulary, dtype=torch.bool, device="cpu")
        row.follow(tokens)
        if row.matcher.is_stopped():
            allowed = torch.zeros(vocabulary, dtype=torch.bool, device="cpu")
            allowed[list(self.eos)] = True
            return allowed
        allowed = _bits(row.matcher.compute_bitmask())[:vocabulary]
        if row.matcher.is_error():
            said = f"the grammar cannot be followed after {len(tokens)} new tokens: {_said(row.matcher)}"
            raise InputError(f"{said:.300}. Make it simpler.")
        if bool(allowed[self.eos[0]]):  # the grammar knows one eos of several
            allowed[list(self.eos)] = True
        return allowed


def _said(matcher: Any) -> str:
    """The library's error, which draws over several lines, as one."""
    return " ".join(matcher.get_error().split())


def _bits(mask: bytes) -> Tensor:
    """One bit a token, the lowest first -> bool."""
    octets = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
    return ((octets[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1).flatten().bool()
