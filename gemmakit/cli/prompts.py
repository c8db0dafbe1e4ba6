"""Prompts from arguments and standard input, and settings from options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from gemmakit.errors import InputError

# A person who sets one of these wants the answer drawn, not the likeliest.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


def read_prompt(argument: str | None) -> str:
    """The argument, or all of standard input without its last line end. Raises InputError where there is neither."""
    if argument is not None and argument != "-":
        return check_text(argument)
    if sys.stdin is None or (sys.stdin.isatty() and argument is None):
        raise InputError('there is no prompt: gemmakit run "text", or echo "text" | gemmakit run.')
    text = decode(sys.stdin.buffer.read(), "standard input")
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise InputError('standard input is empty: give a prompt, or start from nothing with gemmakit run "".')
    return text


def stdin_lines() -> Iterator[str]:
    """The lines of standard input, each as soon as it is there."""
    if sys.stdin is None:
        raise InputError("standard input is closed, so there are no lines to read.")
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode(line, f"line {number} of standard input").removesuffix("\n").removesuffix("\r")


def decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}. Convert it first, "
            "for example with iconv -f latin1 -t utf-8."
        ) from None


def check_text(argument: str) -> str:
    """Python smuggles bytes that are no UTF-8 into arguments as lone surrogates."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("the prompt argument is not UTF-8 text. Convert it first, or pipe it from a file.") from None
    return argument


def given(**options: Any) -> dict[str, Any]:
    """The settings that were set. Any of `SAMPLING` turns sampling on unless do_sample says otherwise."""
    settings = {name: value for name, value in options.items() if value is not None and value != []}
    if "do_sample" not in settings and any(name in settings for name in SAMPLING):
        settings["do_sample"] = True
    return settings
