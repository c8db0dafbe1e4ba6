"""What a text must contain: phrases, and how far along a text is with them. Data; no tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gemmakit.checks import is_whole
from gemmakit.errors import GenerationConfigError

# An expression for the space between the parts of a JSON text. Bounded: a model that is unsure would write it for ever.
JSON_BLANK = r"[\x20\x0A\x0D\x09]{1,32}"


class Constraint:
    """Fulfilled by any one of some phrases, each a tuple of token ids; no phrase begins with another one.

    `advance`, `update` and their like step one by hand, as transformers' constraints are; `generate` keeps no state in
    it.
    """

    phrases: tuple[tuple[int, ...], ...]
    _begun: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        return max(len(phrase) for phrase in self.phrases)

    def next(self, begun: tuple[int, ...]) -> list[int]:
        """The tokens that continue `begun`, the beginning of a phrase; none when it is a whole one."""
        size = len(begun)
        rest = (p[size] for p in self.phrases if len(p) > size and p[:size] == begun)
        return list(dict.fromkeys(rest))

    def remaining(self, begun: tuple[int, ...] | None = None) -> int:
        """Tokens still missing, at most, after `begun`; by default after what `update` was told."""
        begun = self._begun if begun is None else begun
        return self.longest - len(begun) if self.next(begun) else 0

    # -- stepped by hand -------------------------------------------------------------------------------------------

    @property
    def seqlen(self) -> int:
        """Tokens of the longest phrase."""
        return self.longest

    @property
    def completed(self) -> bool:
        """Whether a phrase is whole."""
        return not self.next(self._begun)

    @property
    def current_seq(self) -> list[int]:
        """What of a phrase is there."""
        return list(self._begun)

    def advance(self) -> Any:
        """The tokens that bring it further; None when it is complete."""
        return None if self.completed else self.next(self._begun)

    def does_advance(self, token_id: int) -> bool:
        """Whether a token brings it further."""
        if not is_whole(token_id):
            raise GenerationConfigError(f"token_id is {token_id!r}; it must be a whole number.")
        return token_id in self.next(self._begun)

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        """Take a token in: whether it brought it further, completed it, broke it off, after which it starts anew."""
        steps = self.does_advance(token_id)
        self._begun = (*self._begun, token_id) if steps else ()
        return steps, steps and self.completed, not steps

    def reset(self) -> None:
        """Start anew."""
        self._begun = ()

    def copy(self, stateful: bool = False) -> Any:
        """Another one; stateful: as far along as this one."""
        made = copy.copy(self)
        made._begun = self._begun if stateful else ()
        return made


class PhrasalConstraint(Constraint):
    """These tokens, in this order, one after the other.

    Raises GenerationConfigError when token_ids is no list of at least one whole number >= 0.
    """

    def __init__(self, token_ids: Sequence[int]):
        self.phrases = (_phrase("token_ids", token_ids),)

    @property
    def token_ids(self) -> list[int]:
        return list(self.phrases[0])

    def advance(self) -> int | None:
        """The token that brings it further; None when it is complete."""
        return None if self.completed else self.next(self._begun)[0]

    def __repr__(self) -> str:
        return f"PhrasalConstraint({self.token_ids})"


class DisjunctiveConstraint(Constraint):
    """One of several phrases.

    Raises GenerationConfigError when nested_token_ids is no list of such lists, or one phrase begins with another:
    the longer one could never be asked for.
    """

    def __init__(self, nested_token_ids: Sequence[Sequence[int]]):
        if not isinstance(nested_token_ids, list | tuple) or not nested_token_ids:
            raise GenerationConfigError(
                f"nested_token_ids is {nested_token_ids!r}; it must be a list of at least 1 list of token ids."
            )
        self.phrases = tuple(_phrase("nested_token_ids", phrase) for phrase in nested_token_ids)
        for i, phrase in enumerate(self.phrases):
            for j, other in enumerate(self.phrases):
                if i != j and other[: len(phrase)] == phrase:
                    raise GenerationConfigError(
                        f"nested_token_ids holds {list(phrase)}, with which {list(other)} begins: leave one out."
                    )

    @property
    def token_ids(self) -> list[list[int]]:
        return [list(phrase) for phrase in self.phrases]

    def __repr__(self) -> str:
        return f"DisjunctiveConstraint({self.token_ids})"


def _phrase(name: str, ids: Any) -> tuple[int, ...]:
    tokens = tuple(cast("list[Any]", ids)) if isinstance(ids, list | tuple) else ()
    if not tokens or not all(is_whole(t) and t >= 0 for t in tokens):
        raise GenerationConfigError(f"{name} holds {ids!r}; it must be a list of at least 1 token id >= 0.")
    return tokens


def from_words(force_words_ids: Iterable[Any]) -> list[Constraint]:
    """force_words_ids as constraints: a list of ids is a phrase, a list of such lists leaves the choice."""
    return [
        DisjunctiveConstraint(word) if isinstance(word[0], list | tuple) else PhrasalConstraint(word)
        for word in force_words_ids
    ]


@dataclass(frozen=True)
class Progress:
    """How far a text is with all its constraints.

    pending: those not begun, in the order they are looked at. current: the one in progress, with what of it is there.
    fulfilled: how many are. A token that breaks off a phrase begins no other one, as in transformers 4.46.
    """

    pending: tuple[Constraint, ...]
    current: tuple[Constraint, tuple[int, ...]] | None = None
    fulfilled: int = 0

    @property
    def complete(self) -> bool:
        return not self.pending and self.current is None

    def next(self) -> list[int]:
        """The tokens that bring it further."""
        if self.current is not None:
            return self.current[0].next(self.current[1])
        return [token for constraint in self.pending for token in constraint.next(())]

    def bank(self, longest: int) -> int:
        """A number that grows with every step of progress. longest: of all phrases."""
        begun = 0 if self.current is None else longest - self.current[0].remaining(self.current[1])
        return self.fulfilled * longest + begun

    def after(self, token: int) -> Progress:
        if self.current is not None:
            constraint, begun = self.current
            if token not in constraint.next(begun):
                return Progress((*self.pending, constraint), None, self.fulfilled)
            return self._further(constraint, (*begun, token), self.pending)
        for i, constraint in enumerate(self.pending):
            if token in constraint.next(()):
                return self._further(constraint, (token,), self.pending[:i] + self.pending[i + 1 :])
        return self

    def _further(self, constraint: Constraint, begun: tuple[int, ...], pending: tuple[Constraint, ...]) -> Progress:
        if constraint.next(begun):
            return Progress(pending, (constraint, begun), self.fulfilled)
        return Progress(pending, None, self.fulfilled + 1)

    def through(self, tokens: Iterable[int]) -> Progress:
        progress = self
        for token in tokens:
            progress = progress.after(token)
        return progress
