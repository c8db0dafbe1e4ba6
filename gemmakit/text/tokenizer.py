"""Everything that does not depend on who encodes: special tokens, names and ids, decoding."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gemmakit.errors import InputError, TokenizerError
from gemmakit.text.calling import Calling
from gemmakit.text.chat import Chat
from gemmakit.text.encoding import SIDES, one_of, to_lists
from gemmakit.text.files import Saving
from gemmakit.text.stream import CleanedDecoder, Decoder, IncrementalDecoder
from gemmakit.text.vocabulary import (
    AddedToken,
    Engine,
    ShownPieces,
    join_shown,
    out_of_range,
    shown,
)

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "sep_token", "cls_token")
# What transformers writes for "no limit"; kept so that saved files mean the same there.
NO_LIMIT = int(1e30)


def _token(name: str) -> Any:
    def get(self: TokenizerBase) -> str | None:
        return self._named[name]

    def set_(self: TokenizerBase, value: Any) -> None:
        self._set_named(name, value)

    return property(get, set_, doc=f"The {name.replace('_', ' ')} as text, or None. Must be in the vocabulary.")


def _token_id(name: str) -> Any:
    def get(self: TokenizerBase) -> int | None:
        token = self._named[name]
        return None if token is None else self._engine.token_to_id(token)

    def set_(self: TokenizerBase, value: int | None) -> None:
        self._set_named(name, None if value is None else self.convert_ids_to_tokens(int(value)))

    return property(get, set_, doc=f"The id of the {name.replace('_', ' ')}, or None.")


class TokenizerBase(Calling, Chat, Saving):
    """The interface of both tokenizers.

    Settings (all can be changed later, with effect at once): `add_bos_token`, `add_eos_token`, `padding_side` ("left"),
    `truncation_side` ("right"), `model_max_length`, `clean_up_tokenization_spaces`, `spaces_between_special_tokens`,
    `chat_template` (None means Gemma's own), the special tokens by name (`bos_token`, ...) and by id (`bos_token_id`).
    """

    is_fast = False
    pad_token_type_id = 0
    vocab_file: str | None = None

    bos_token, bos_token_id = _token("bos_token"), _token_id("bos_token")
    eos_token, eos_token_id = _token("eos_token"), _token_id("eos_token")
    unk_token, unk_token_id = _token("unk_token"), _token_id("unk_token")
    pad_token, pad_token_id = _token("pad_token"), _token_id("pad_token")
    mask_token, mask_token_id = _token("mask_token"), _token_id("mask_token")
    sep_token, sep_token_id = _token("sep_token"), _token_id("sep_token")
    cls_token, cls_token_id = _token("cls_token"), _token_id("cls_token")

    def __init__(
        self,
        engine: Engine,
        *,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        use_default_system_prompt: bool = False,
        spaces_between_special_tokens: bool = False,
        padding_side: str = "left",
        truncation_side: str = "right",
        model_max_length: int | float | None = None,
        model_input_names: Sequence[str] = ("input_ids", "attention_mask"),
        additional_special_tokens: Sequence[Any] | None = None,
        extra_special_tokens: Sequence[Any] | Mapping[str, Any] | None = None,
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        split_special_tokens: bool = False,
        name_or_path: str = "",
        **other: Any,
    ) -> None:
        self._engine = engine
        self._shown = ShownPieces(engine)
        self._named: dict[str, str | None] = dict.fromkeys(NAMED)
        self._extra: list[str] = []
        self._warned: set[str] = set()
        self._add_bos_token, self._add_eos_token = bool(add_bos_token), bool(add_eos_token)
        self.clean_up_tokenization_spaces = bool(clean_up_tokenization_spaces)
        self.use_default_system_prompt = use_default_system_prompt
        self.spaces_between_special_tokens = spaces_between_special_tokens
        self.padding_side = one_of("padding_side", padding_side, SIDES)
        self.truncation_side = one_of("truncation_side", truncation_side, SIDES)
        self.model_max_length = NO_LIMIT if model_max_length is None else int(model_max_length)
        self.model_input_names = list(model_input_names)
        self.chat_template = chat_template
        self.split_special_tokens = split_special_tokens
        self.name_or_path = name_or_path
        named = {name: other.pop(name, None) for name in NAMED}
        # Whatever a configuration says beyond what is known here is kept, and written back by save_pretrained.
        self._other = other
        self._register(
            named, added_tokens_decoder, [*(additional_special_tokens or ()), *_listed(extra_special_tokens)]
        )

    def _register(self, named: Mapping[str, Any], decoder: Mapping[Any, Any] | None, extra: Sequence[Any]) -> None:
        listed = sorted((int(key), AddedToken.of(value)) for key, value in (decoder or {}).items())
        self._engine.add([token for _, token in listed])
        for index, token in listed:
            if self._engine.token_to_id(token.content) != index:
                raise TokenizerError(
                    f"added_tokens_decoder gives {token.content!r} the id {index}; the vocabulary differs."
                )
        for name, value in named.items():
            # A vocabulary without a mask token is no fault: only v5's signature names one.
            if value is None or (name == "mask_token" and self._engine.token_to_id(str(value)) is None):
                continue
            self._add_special(value)
            self._named[name] = str(value)
        for token in extra:
            self._add_special(token)
        self._extra = list(dict.fromkeys(str(token) for token in extra))
        known = {*self._extra, *(token for token in self._named.values() if token)}
        self._extra += [
            t.content for _, t in sorted(self._engine.added.items()) if t.special and t.content not in known
        ]

    def _add_special(self, value: Any) -> int:
        token = AddedToken.of(value, special=True)
        return self._engine.add([replace(token, normalized=False)])

    def _set_named(self, name: str, value: Any) -> None:
        if value is not None:
            if self._engine.token_to_id(str(value)) is None:
                raise TokenizerError(
                    f"{name} {str(value)!r} is not in the vocabulary. "
                    f"Add it with add_special_tokens({{{name!r}: {str(value)!r}}})."
                )
            self._add_special(value)
        self._named[name] = None if value is None else str(value)
        self.update_post_processor()

    # -- settings that decide the special tokens around a text

    @property
    def add_bos_token(self) -> bool:
        return self._add_bos_token

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos_token = bool(value)
        self.update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        return self._add_eos_token

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos_token = bool(value)
        self.update_post_processor()

    # -- the vocabulary

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary file, without those added later."""
        return self._engine.vocab_size

    def __len__(self) -> int:
        return len(self._engine.vocab())

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id, added tokens included; a copy."""
        return self._engine.vocab()

    vocab = property(get_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens matched whole, by id; a copy."""
        return dict(sorted(self._engine.added.items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def added_token(self, name: str) -> tuple[int, bool] | None:
        """The id of a token that is matched whole, and whether it is special; None where there is none of this name."""
        index = self._engine.token_to_id(name)
        token = None if index is None else self._engine.added.get(index)
        return None if index is None or token is None else (index, token.special)

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: token for name, token in self._named.items() if token is not None}

    @property
    def additional_special_tokens(self) -> list[str]:
        return list(self._extra)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Iterable[Any] | None) -> None:
        self.add_special_tokens({"additional_special_tokens": list(tokens or ())})

    extra_special_tokens = additional_special_tokens

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self._extra)

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Iterable[int] | None) -> None:
        self.additional_special_tokens = [self.convert_ids_to_tokens(int(index)) for index in ids or ()]

    extra_special_tokens_ids = additional_special_tokens_ids

    @property
    def all_special_tokens(self) -> list[str]:
        """Named and additional special tokens, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._engine.token_to_id(token) for token in self.all_special_tokens]  # type: ignore[misc]

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add a token or a list of them (strings or AddedToken). Returns how many were not in the vocabulary.

        The model's embedding must then grow: `model.resize_token_embeddings(len(tokenizer))`.
        """
        listed = new_tokens if isinstance(new_tokens, (list, tuple)) else [new_tokens]
        tokens = [AddedToken.of(token, special=special_tokens or None) for token in listed]
        known = set(self.all_special_tokens)
        self._extra += [t.content for t in tokens if t.special and t.content not in known]
        return self._engine.add(tokens)

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Any],
        replace_extra_special_tokens: bool = True,
        *,
        replace_additional_special_tokens: bool | None = None,
    ) -> int:
        """Add and name special tokens: `{"pad_token": "<pad>", "additional_special_tokens": [...]}`.

        replace_extra_special_tokens: False keeps the additional ones that there are; the other is its older name.
        Returns how many of them are new to the vocabulary.
        """
        older = replace_additional_special_tokens
        replace = replace_extra_special_tokens if older is None else older
        new = 0
        for name, value in special_tokens_dict.items():
            if name in ("additional_special_tokens", "extra_special_tokens"):
                new += sum(self._add_special(token) for token in value)
                kept = [] if replace else self._extra
                self._extra = list(dict.fromkeys([*kept, *(str(token) for token in value)]))
            elif name in NAMED:
                new += self._add_special(value)
                self._set_named(name, value)
            else:
                raise InputError(
                    f"{name!r} is no special token; known are {', '.join(NAMED)} and additional_special_tokens."
                )
        return new

    # -- names and ids

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """A token or a list of tokens to ids; what is not in the vocabulary becomes the unknown token's id."""
        if isinstance(tokens, str):
            index = self._engine.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """An id or a list of ids to tokens. Raises TokenOutOfRange for an id that the vocabulary does not have."""
        ids = to_lists(ids)
        if isinstance(ids, int):
            token = self._engine.id_to_token(ids)
            if token is None:
                raise out_of_range(ids, self._engine)
            return token
        skip = set(self.all_special_ids) if skip_special_tokens else ()
        return [self.convert_ids_to_tokens(index) for index in ids if index not in skip]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join tokens into text: U+2581 becomes a space, byte pieces become characters."""
        return join_shown(map(shown, tokens))

    # -- decoding

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
    ) -> Any:
        """Ids to text; a batch of ids to a list of texts. Ids may be an int, lists, arrays or tensors.

        `clean_up_tokenization_spaces` drops the space before English punctuation, which changes the text; None takes
        the tokenizer's setting. Raises TokenOutOfRange for an id that the vocabulary does not have.
        """
        ids: Any = to_lists(token_ids.get("input_ids") if isinstance(token_ids, Mapping) else token_ids)
        if isinstance(ids, int):
            ids = [ids]
        options = (skip_special_tokens, clean_up_tokenization_spaces, spaces_between_special_tokens)
        if ids and isinstance(ids[0], list):
            return [self._decode(row, *options) for row in ids]
        return self._decode(ids, *options)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """`decode` for each sequence; always a list."""
        text = self.decode(sequences, skip_special_tokens, **options)
        return text if isinstance(text, list) else [text]

    def _decode(self, ids: Sequence[int], skip_special: bool, clean_up: bool | None, spaced: bool | None) -> str:
        decoder = self._plain_decoder(skip_special, spaced)
        text = decoder.push(ids) + decoder.finish()
        return self.clean_up_tokenization(text) if self._setting("clean_up_tokenization_spaces", clean_up) else text

    def _skipped_ids(self) -> frozenset[int]:
        return self._engine.added.special_ids.union(self.all_special_ids)

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """Drop the space before . ? ! , and before English contractions."""
        for mark in (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re"):
            text = text.replace(f" {mark}", mark)
        return text.replace(" ' ", "'")

    def incremental_decoder(
        self,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
    ) -> Decoder:
        """A decoder for streaming: `push(ids)` gives the text that is now certain, `finish()` the rest."""
        decoder = self._plain_decoder(skip_special_tokens, spaces_between_special_tokens)
        clean_up = self._setting("clean_up_tokenization_spaces", clean_up_tokenization_spaces)
        return CleanedDecoder(decoder, self.clean_up_tokenization) if clean_up else decoder

    def _plain_decoder(self, skip_special: bool, spaced: bool | None) -> IncrementalDecoder:
        spaced = self._setting("spaces_between_special_tokens", spaced)
        skip = self._skipped_ids() if skip_special else ()
        return IncrementalDecoder(self._shown, skip, self._engine.added if spaced else ())

    def _setting(self, name: str, given: bool | None) -> bool:
        return getattr(self, name) if given is None else given

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, UserWarning, stacklevel=4)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"padding_side={self.padding_side!r}, special_tokens={self.special_tokens_map})"
        )


def _listed(value: Any) -> list[Any]:
    if not value:
        return []
    return list(value.values()) if isinstance(value, Mapping) else list(value)


__all__ = ["NO_LIMIT", "TokenizerBase"]
