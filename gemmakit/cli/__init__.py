"""The `gemmakit` command. Each verb is a file here, loaded only when it is called: help costs no more than Python."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gemmakit import __version__
from gemmakit.cli.shell import abandon_output, execute, settle

# verb -> what it does, in one line of help
VERBS = {
    "run": "Continue a text or answer a question, streaming as it goes",
    "chat": "Talk with a model in the terminal",
    "serve": "Answer any OpenAI client over HTTP",
    "batch": "Answer a file of requests, whatever interrupts it",
    "tune": "Train a model on a file of rows",
    "merge": "Make an adapter part of its model",
    "convert": "Turn a checkpoint of any origin into safetensors, msgpack or GGUF",
    "doctor": "Say what this machine can run, or whether a checkpoint is whole",
    "bench": "Measure speed, as a share of what the machine can do",
    "quantize": "Write a model in 4 to 8 bits a weight",
    "env": "List versions, for bug reports",
}

HELP = """\
Usage: gemmakit COMMAND [OPTIONS]

  Run Google's Gemma.

Commands:
{verbs}

Options:
  --version  Print the version.
  --help     Print this help; after a command, that command's.

Try:
  gemmakit run --chat "What is 34 + 58?"
  echo "def add(" | gemmakit run --model google/gemma-2b --device 0
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv by default) and give its exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    first, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if first in ("--help", "-h") or (first == "help" and not rest):
        return _print(HELP.format(verbs="\n".join(f"  {verb:<8} {line}" for verb, line in VERBS.items())))
    if first in ("--version", "-V"):
        return _print(f"gemmakit {__version__}\n")
    if first == "help":
        first, rest = rest[0], ["--help"]
    if first not in VERBS:
        return _unknown(first)
    code = execute(first, rest)
    if arguments is None:
        settle()
    return code


def _print(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (BrokenPipeError, AttributeError):
        return abandon_output()
    return 0


def _unknown(verb: str) -> int:
    import difflib

    close = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"The commands are {', '.join(VERBS)}."
    what = "option" if verb.startswith("-") else "command"
    print(f"gemmakit: there is no {what} {verb!r}. {hint}", file=sys.stderr)
    return 2
