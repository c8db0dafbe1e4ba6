"""Of which kinds the arguments of generate() must be. What their values may be is checked where they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.cache import Cache


def check_config(value: Any) -> None:
    if value is not None and not isinstance(value, GenerationConfig):
        remedy = "GenerationConfig(**settings), or pass the settings themselves"
        if hasattr(value, "to_diff_dict"):  # transformers' own
            remedy = "gemmakit.GenerationConfig.from_dict(generation_config.to_diff_dict())"
        raise InputError(f"generation_config is a {type(value).__name__}; it must be gemmakit's: {remedy}.")


def check_cache(value: Any) -> None:
    if value is not None and not isinstance(value, Cache | tuple | list):
        raise InputError(
            f"past_key_values is a {type(value).__module__}.{type(value).__name__}; give a gemmakit Cache, or "
            "(key, value) of each layer."
        )


def check_generator(value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise InputError(f"generator is a {type(value).__name__}; give a torch.Generator, or a number as seed=.")


def functions(name: str, value: Iterable[Callable[..., Any]] | None) -> tuple[Callable[..., Any], ...]:
    """The caller's functions. Raises InputError for one alone, or for what cannot be called."""
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise InputError(f"{name} is a {type(value).__name__}; give a list of functions, [{name}] if it is one.")
    found = tuple(value)
    for each in found:
        if not callable(each):
            raise InputError(f"{name} holds a {type(each).__name__}, which cannot be called: give functions.")
    return found
