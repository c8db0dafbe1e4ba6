"""Every exception gemmakit raises on purpose.

GemmakitError
├── ConfigError            (ValueError)       a GemmaConfig field is impossible
├── InputError             (ValueError)       a call's arguments do not fit together
│   ├── GenerationConfigError                 a generation setting is out of its range
│   ├── TokenOutOfRange                       a token id that the vocabulary does not have
│   └── PromptTooLong                         prompt + new tokens over the context or the cache
├── QueueFull              (RuntimeError)     an engine that takes no more requests for now
├── NumericalError         (ArithmeticError)  NaN or infinity where a number is needed
├── TokenizerError         (ValueError)       a vocabulary file or a text that cannot be tokenized
│   └── TemplateError                         a chat template that is malformed or refused
├── CheckpointError        (OSError)          files that are missing, damaged or inconsistent
│   ├── UnsafeFile                            a file that could run code or leave its folder
│   └── HubError                              the Hub: offline, gated, missing, interrupted
├── NotEnoughMemory        (MemoryError)      found before the allocation where it can be known
├── ServerError            (RuntimeError)     a server that does not answer, or refuses
├── BatchStopped           (RuntimeError)     a batch file that cannot go on now; what is done is kept
└── MissingDependency      (ImportError)      an extra that is not installed

Each message says what happened, the values, the limit and the remedy, in one paragraph; the command line prints it so.
"""

from __future__ import annotations


class GemmakitError(Exception):
    """The base of all of gemmakit's own exceptions."""


class ConfigError(GemmakitError, ValueError):
    """A model configuration that no Gemma can have."""


class InputError(GemmakitError, ValueError):
    """Arguments of a call that are out of range or contradict each other."""


class GenerationConfigError(InputError):
    """A generation setting outside its range; names the field, the value and the range."""


class TokenOutOfRange(InputError):
    """A token id that is negative or not below the vocabulary size."""


class PromptTooLong(InputError):
    """The prompt and the tokens asked for do not fit the context or the cache."""


class QueueFull(GemmakitError, RuntimeError):
    """An engine has as many requests waiting as it may; the same request can be added later."""


class NumericalError(GemmakitError, ArithmeticError):
    """NaN or infinity met where a probability or a loss is needed."""


class TokenizerError(GemmakitError, ValueError):
    """A vocabulary that cannot be read, or a text that cannot be encoded."""


class TemplateError(TokenizerError):
    """A chat template that is malformed, unsafe, too slow or too large."""


class CheckpointError(GemmakitError, OSError):
    """Checkpoint files that are missing, truncated or inconsistent with each other."""


class UnsafeFile(CheckpointError):
    """A file refused because reading it could run code or touch something outside its folder."""


class HubError(CheckpointError):
    """The Hub could not give the file; says why and what to do next."""


class NotEnoughMemory(GemmakitError, MemoryError):
    """An allocation that would not fit; gives needed and free bytes."""


class ServerError(GemmakitError, RuntimeError):
    """A server that was asked does not answer, refuses, or ends in the middle."""


class BatchStopped(GemmakitError, RuntimeError):
    """A batch file whose work cannot go on now: says why, what is kept, and how to go on."""


class MissingDependency(GemmakitError, ImportError):
    """An optional package that is needed here; names the command that installs it."""
