"""What the two encoders share: added tokens, the engine they both implement, and pieces back to text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby, takewhile
from operator import itemgetter
from typing import Any, Protocol

from gemmakit.errors import TokenizerError, TokenOutOfRange

SPACE = "▁"
# What begins and ends a turn: up to Gemma 3, and in Gemma 4.
TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>")
LATER_TURN_TOKENS = ("<|turn>", "<turn|>")
Offsets = list[tuple[int, int]]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Gemma has a token for each of these tags, opening and closing; they are ordinary text.
_TAGS = "table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code"
_TAG = re.compile(f"</?(?:{_TAGS})>")
# Tokens that steer: turns and <mask>, and in Gemma 4 whatever opens as <|name>, closes as <name|>, or is <|name|>.
_CONTROL = re.compile(r'<(?:start|end)_of_turn>|<mask>|<\|(?:[a-z_]+|")\|?>|<[a-z_]+\|>')


@dataclass(frozen=True)
class AddedToken:
    """A token matched in raw text before the vocabulary's own rules. Fields as in the `tokenizers` library.

    `normalized=None` means: match the text as it is for a special token, after spaces became U+2581 otherwise.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.content, str) or not self.content:
            raise TokenizerError(f"an added token must be a non-empty string, found {self.content!r}.")
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def __str__(self) -> str:
        return self.content

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, value: Any, special: bool | None = None) -> AddedToken:
        """From a string, a dictionary, this class, or the `tokenizers` library's class."""
        if isinstance(value, str):
            return cls(value, special=bool(special))
        names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        if isinstance(value, Mapping):
            fields: dict[str, Any] = {name: value[name] for name in names if name in value}
        elif hasattr(value, "content"):
            fields = {name: getattr(value, name) for name in names if hasattr(value, name)}
        else:
            raise TokenizerError(f"a token must be a string or an AddedToken, found {type(value).__name__} {value!r}.")
        fields = {name: field for name, field in fields.items() if field is not None or name == "content"}
        for name in names[1:]:
            if not isinstance(fields.get(name, False), bool):
                raise TokenizerError(f"added token {fields.get('content')!r}: {name} must be true or false.")
        if special:
            fields["special"] = True
        return cls(**fields)


class AddedTokens(dict[int, AddedToken]):
    """The tokens that are matched whole, by id, and what is worked out from all of them, once for many texts."""

    def __setitem__(self, index: int, token: AddedToken) -> None:
        super().__setitem__(index, token)
        self.__dict__.clear()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        return frozenset(index for index, token in self.items() if token.special)

    @cached_property
    def structural(self) -> list[str]:
        """Tokens that only a program should write: specials, turns, unused tokens; not runs of space, not tags."""
        return [token.content for token in self.values() if is_structural(token)]

    @cached_property
    def special_starts(self) -> re.Pattern[str]:
        """Matches, with no width, wherever a special token begins, also inside another one."""
        return _starts(token for token in self.values() if token.special)

    @cached_property
    def structural_starts(self) -> re.Pattern[str]:
        """Matches, with no width, wherever a structural token begins, also inside another one."""
        return _starts(filter(is_structural, self.values()))

    @cached_property
    def structural_heads(self) -> frozenset[str]:
        """Every proper beginning of every structural token."""
        return frozenset(text[:size] for text in self.structural for size in range(1, len(text)))


def _starts(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    pattern = alternatives(tokens)
    return re.compile(f"(?={pattern})" if pattern else r"(?!)")


class Engine(Protocol):
    """Text to ids and names to ids; knows nothing of BOS, padding or batches of different lengths."""

    added: AddedTokens

    @property
    def vocab_size(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]: ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, index: int) -> str | None: ...

    def vocab(self) -> dict[str, int]: ...

    def add(self, tokens: Iterable[AddedToken]) -> int: ...

    def set_around(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Take note of the special tokens around a text, where what is saved or lent to others must know them."""
        ...

    def model_bytes(self) -> bytes | None:
        """The SentencePiece model, where it is one that encodes."""
        ...

    def tokenizer_json(self, before: Sequence[int], after: Sequence[int]) -> str:
        """The text of a `tokenizer.json` that puts these ids before and after a text."""
        ...


def merge_added(existing: dict[int, AddedToken], token: AddedToken, index: int) -> AddedToken:
    """`token` as it should be registered at `index`: what is special stays special, what is matched raw stays raw."""
    old = existing.get(index)
    if old is None or token.special == old.special:
        return token if old is None else replace(token, normalized=old.normalized)
    return replace(old, special=True)


def is_structural(token: AddedToken) -> bool:
    """True for tokens that only a program should write: specials, turns, unused tokens; not runs of space, not tags."""
    text = token.content
    return token.special or not (_TAG.fullmatch(text) or not text.strip(SPACE + " \n\t\r"))


def is_control(text: str) -> bool:
    """True for a user-defined piece of a vocabulary that is a special token all the same."""
    return _CONTROL.fullmatch(text) is not None


def alternatives(tokens: Iterable[AddedToken]) -> str:
    """A regular expression that matches the longest of `tokens` at the leftmost place; "" for none."""
    tokens = list(tokens)
    if tokens and not any(token.single_word or token.lstrip or token.rstrip for token in tokens):
        return _longest(sorted({token.content for token in tokens}), depth=32)
    parts = []
    for token in sorted(tokens, key=lambda token: (-len(token.content), token.content)):
        part = re.escape(token.content)
        if token.single_word:
            part = rf"(?<!\w){part}(?!\w)"
        parts.append((r"\s*" if token.lstrip else "") + part + (r"\s*" if token.rstrip else ""))
    return "|".join(parts)


def _longest(words: list[str], depth: int) -> str:
    """A pattern of the longest of sorted `words` that branches where they do: thousands cost what a few cost.

    depth: how many branches may be inside one another; the compiler has a limit.
    """
    if len(words) == 1 or not depth:
        return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    ends = zip(words[0], words[-1], strict=False)  # they are sorted: what these share, all share
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    rests = [word[common:] for word in words]
    groups = [list(group) for _, group in groupby(filter(None, rests), itemgetter(0))]
    branches = "|".join(_longest(group, depth - 1) for group in groups)
    return f"{re.escape(words[0][:common])}(?:{branches}){'' if all(rests) else '?'}"


def check_text(text: str) -> str:
    """`text` unchanged, or TokenizerError: only whole Unicode characters have UTF-8 bytes to encode."""
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a string, found {type(text).__name__}.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is "
                "half of a character and has no encoding. Repair the text, for example with "
                "text.encode('utf-8', 'replace').decode('utf-8')."
            ) from None
    return text


def shown(piece: str) -> str | int:
    """What a piece adds to the text: its characters, with U+2581 as a space, or the value of the byte it stands for."""
    match = _BYTE.fullmatch(piece) if len(piece) == 6 else None
    return int(match[1], 16) if match else piece.replace(SPACE, " ")


class ShownPieces(dict[int, "str | int"]):
    """`shown` for each id of an engine, remembered. An id that the vocabulary does not have raises TokenOutOfRange."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def __missing__(self, index: int) -> str | int:
        piece = self.engine.id_to_token(index)
        if piece is None:
            raise out_of_range(index, self.engine)
        value = self[index] = shown(piece)
        return value


def out_of_range(index: Any, engine: Engine) -> TokenOutOfRange:
    return TokenOutOfRange(f"token id {index} is not in the vocabulary, which has {len(engine.vocab())} tokens.")


def bytes_to_text(run: bytes | bytearray) -> str:
    """A whole run of byte pieces as text: its UTF-8, or one U+FFFD for each byte if any of them is out of place."""
    try:
        return run.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def join_shown(items: Iterable[str | int]) -> str:
    """Text of a sequence of `shown` pieces; runs of byte values become characters."""
    parts: list[str] = []
    run = bytearray()
    for item in items:
        if isinstance(item, int):
            run.append(item)
            continue
        if run:
            parts.append(bytes_to_text(run))
            run.clear()
        parts.append(item)
    if run:
        parts.append(bytes_to_text(run))
    return "".join(parts)
