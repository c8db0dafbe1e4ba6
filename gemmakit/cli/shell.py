"""Where a verb meets the shell: parsing, exit codes, one line for an error, quiet pipes, short warnings."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from gemmakit.errors import GemmakitError

FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
LOST = "the connection to another process of this run broke off"
# What can move the cursor or change the terminal; a model can be made to write it.
_SPELLED = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_SETTINGS = {"help_option_names": ["-h", "--help"]}
command: list[str] = []  # the verb and the arguments that run


def execute(verb: str, arguments: Sequence[str]) -> int:
    """Run a verb on its arguments; the exit code. GEMMAKIT_DEBUG=1 shows tracebacks."""
    if sys.stdout is None:
        return _fail("standard output is closed, so there is nowhere to print.")
    command[:] = [verb, *arguments]
    debug = os.environ.get("GEMMAKIT_DEBUG", "") not in ("", "0")
    with _noting_ctrl_c() as pressed:
        try:
            _prepare_streams(debug)
            function = getattr(import_module(f"gemmakit.cli.{verb}"), verb)
            code = _parse_and_call(function, verb, arguments)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            return abandon_output()
        except Exception as error:
            message = _message(error)
            if message is None and pressed and not debug:
                return INTERRUPTED
            if debug or message is None:
                raise
            return _fail(message)


@contextmanager
def _noting_ctrl_c() -> Generator[list[bool], None, None]:
    """A list that is no longer empty once Ctrl-C was pressed.

    Native code (safetensors, while it maps a file) may turn the KeyboardInterrupt that it meets into an error of
    its own.
    """
    pressed: list[bool] = []

    def note_it(number: int, frame: Any) -> None:
        pressed.append(True)
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where a parent had it ignored
    )
    if ours:
        signal.signal(signal.SIGINT, note_it)
    try:
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _message(error: Exception) -> str | None:
    """What to tell the user; None for what can only be a mistake in gemmakit."""
    if isinstance(error, GemmakitError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory. Choose a smaller model or dtype, or a shorter prompt; see gemmakit doctor MODEL."
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which a short command has not imported
        return f"{str(error).split('. ')[0]}. Choose a smaller dtype, or --device cpu."
    if is_of_lost_process(error):
        return f"{LOST}."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO):
        return f"cannot write: {error.strerror}."
    return None


def is_of_lost_process(error: BaseException) -> bool:
    """Whether another process that shares the model is gone: gloo says so as a RuntimeError, NCCL by its own kinds."""
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or type(error).__name__.startswith("Dist"))


def settle() -> None:
    """The work is done: from here on Ctrl-C ends the process without a traceback from Python's own clearing up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def abandon_output() -> int:
    """Whoever read our output left: say nothing more, also not while Python shuts down."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    if sys.stdout is not None:
        os.dup2(devnull, sys.stdout.fileno())
    return PIPE_CLOSED


def show(text: str, dim: bool = False) -> None:
    """Print a piece of generated text at once. On a terminal its control characters are spelled out, not obeyed.

    dim: for what stands beside the text, which a pipe gets none of.
    """
    if sys.stdout.isatty():
        text = text.translate(_SPELLED)
        text = f"\x1b[2m{text}\x1b[22m" if dim and os.environ.get("TERM") != "dumb" else text
    elif dim:
        return
    sys.stdout.write(text)
    sys.stdout.flush()


def note(message: str) -> None:
    """A line for the person at the terminal, apart from the results."""
    if sys.stderr is not None:  # print() would take None for standard output
        print(f"gemmakit: {message}", file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    note(" ".join(message.split()))
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # what could not be written would be tried again while Python shuts down
        abandon_output()
    return FAILED


def _prepare_streams(debug: bool) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not debug:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries; what failed is said once, by us
        warnings.showwarning = _short_warning
        warnings.filterwarnings("ignore", category=FutureWarning)


def _short_warning(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
    note(f"note: {' '.join(str(message).split())}")


def _parse_and_call(function: Callable[..., Any], verb: str, arguments: Sequence[str]) -> int:
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=_SETTINGS)
    app.command(name=verb)(function)
    # Not command.main(): it has its own ideas of Ctrl-C and of pipes whose reader left.
    command = typer.main.get_command(app)
    try:
        with command.make_context(f"gemmakit {verb}", list(arguments)) as context:
            result = command.invoke(context)
    except Exception as error:
        # typer may carry its own copy of click, so that its classes have no one home.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        if not hasattr(error, "format_message"):
            return code
        return _fail(f"{error.format_message().rstrip('.')}. See gemmakit {verb} --help.")  # type: ignore[attr-defined]
    return result if isinstance(result, int) else 0
