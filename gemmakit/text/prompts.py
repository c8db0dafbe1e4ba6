"""Prompts by name: what an embedding model wants in front of a text, by what the text is for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemmakit.errors import InputError, TokenizerError
from gemmakit.hub import HubOptions, find_file
from gemmakit.text.vocabulary_files import read_json

SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"


@dataclass(frozen=True)
class Prompts:
    """The prompts of a model, as sentence-transformers stores them: {"query": "task: search result | query: "}.

    default: the name of the one that a text gets when none is asked for; None for no prompt.
    """

    by_name: Mapping[str, str] = field(default_factory=dict[str, str])
    default: str | None = None

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **where: Any) -> Prompts:
        """Of a folder or Hub id; none where it has no such file. where: revision, token, ... as for a tokenizer.

        Raises TokenizerError for a file that is malformed.
        """
        path = find_file(os.fspath(name), SENTENCE_TRANSFORMERS, HubOptions(**where), optional=True)
        return cls() if path is None else cls.of(read_json(path), path)

    @classmethod
    def of(cls, config: Any, path: str | Path = SENTENCE_TRANSFORMERS) -> Prompts:
        """Of what the file holds."""
        prompts = config.get("prompts") or {} if isinstance(config, dict) else None
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            raise TokenizerError(f"{path}: prompts must be an object of texts by name, found {prompts!r:.80}.")
        default = config.get("default_prompt_name")
        if default is not None and default not in prompts:
            raise TokenizerError(f"{path}: default_prompt_name is {default!r}; the prompts are {_names(prompts)}.")
        return cls(prompts, default)

    def apply(self, texts: Sequence[str], name: str | None = None, prompt: str | None = None) -> list[str]:
        """The texts with the prompt of this name in front, or with `prompt` itself. Raises InputError for an unknown
        name, or for both.
        """
        if name is not None and prompt is not None:
            raise InputError(f"prompt_name {name!r} and prompt {prompt!r} are both given: give one of them.")
        name = self.default if name is None else name
        if prompt is None and name is not None and name not in self.by_name:
            raise InputError(f"there is no prompt {name!r}; the model has {_names(self.by_name)}.")
        front = (self.by_name[name] if name is not None else "") if prompt is None else prompt
        return [front + text for text in texts]


def _names(prompts: Mapping[str, str]) -> str:
    return ", ".join(map(repr, prompts)) or "none"
