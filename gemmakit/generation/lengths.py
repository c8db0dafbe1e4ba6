"""How many tokens may come, and what fills a row that ends before the others: plain numbers, for either backend."""

from __future__ import annotations

from gemmakit.errors import PromptTooLong
from gemmakit.generation.config import GenerationConfig

DEFAULT_NEW_TOKENS = 20


def new_tokens(config: GenerationConfig, context: int, prompt: int, longest: int) -> tuple[int, str]:
    """New tokens a row may get, at least 1, and in words why so many.

    context: positions of the model. prompt: places of a row that are taken; longest: those of them without padding.
    Raises PromptTooLong where they do not fit.
    """
    if config.max_new_tokens is not None:
        new, asked = config.max_new_tokens, f"max_new_tokens is {config.max_new_tokens}"
    elif config.max_length is not None:
        new, asked = config.max_length - prompt, f"max_length is {config.max_length}"
        if new < 1:
            raise PromptTooLong(
                f"prompt has {prompt} tokens and max_length is {config.max_length}, which counts the prompt: "
                "raise max_length, or use max_new_tokens."
            )
    else:
        new = max(1, min(DEFAULT_NEW_TOKENS, context - prompt))
        asked = f"{new} new tokens are asked for"
    if longest + new > context:
        room = context - longest
        remedy = f", or ask for at most {room} new tokens" if room > 0 else f" to fewer than {context} tokens"
        raise PromptTooLong(
            f"prompt has {longest} tokens and {asked}, but the context holds {context}. Shorten the prompt{remedy}."
        )
    return new, asked


def filler(config: GenerationConfig) -> int:
    """What fills rows that end before the others: the pad token, else an eos, else 0."""
    if config.pad_token_id is not None and config.pad_token_id >= 0:
        return config.pad_token_id
    return config.eos_token_ids[0] if config.eos_token_ids else 0
