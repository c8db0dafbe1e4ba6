"""gemmakit's objects for libraries that ask `isinstance` of transformers' classes: Trainer, TRL, lm-eval, guidance.

Importing this loads nothing of transformers; `register_transformers` does.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from gemmakit.config import GemmaConfig
from gemmakit.errors import MissingDependency
from gemmakit.generation import GenerationConfig
from gemmakit.outputs import ModelOutput
from gemmakit.pytorch.cache import DynamicCache, StaticCache
from gemmakit.pytorch.pretrained import GemmaPreTrainedModel
from gemmakit.text import BatchEncoding, GemmaTokenizer, GemmaTokenizerFast

__all__ = ["register_transformers", "unregister_transformers"]

# Ours, and the class of transformers' that every one of its kind is an instance of.
_KINDS: dict[type, str] = {
    GemmaPreTrainedModel: "PreTrainedModel",
    GemmaConfig: "PretrainedConfig",
    GenerationConfig: "GenerationConfig",
    GemmaTokenizer: "PreTrainedTokenizer",
    GemmaTokenizerFast: "PreTrainedTokenizerFast",
    BatchEncoding: "BatchEncoding",
    ModelOutput: "ModelOutput",
    DynamicCache: "Cache",
    StaticCache: "Cache",
}
_HOMES = ("transformers", "transformers.modeling_outputs", "transformers.generation", "transformers.utils")
_TYPE = vars(object)["__class__"]


def register_transformers() -> None:
    """From now on gemmakit's models, configurations, tokenizers, outputs and caches pass for transformers'.

    `isinstance(model, transformers.PreTrainedModel)` is True, and `model.__class__` is transformers' class of the same
    name; `type(model)`, what it does and what it computes stay gemmakit's. It holds for all objects of this process,
    those that exist included, until `unregister_transformers`. Twice is once.

    Raises MissingDependency where transformers is not installed.
    """
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependency(
            "register_transformers() needs transformers: pip install 'gemmakit[transformers]'."
        ) from error
    for kind in _KINDS:
        if Claim not in kind.__bases__:
            kind.__bases__ = (*kind.__bases__, Claim)


def unregister_transformers() -> None:
    """Undo `register_transformers`."""
    for kind in _KINDS:
        if Claim in kind.__bases__:
            kind.__bases__ = tuple(base for base in kind.__bases__ if base is not Claim)


def _reduce(self: Any, protocol: Any) -> Any:
    made = object.__reduce_ex__(self, protocol)
    if isinstance(made, tuple) and getattr(made[0], "__name__", "") == "__newobj__":
        return (remade, *made[1:])  # pickle compares what __newobj__ makes with __class__
    return made


def remade(kind: type, *arguments: Any) -> Any:
    """What pickle makes an object of before it gives it its state."""
    return kind.__new__(kind, *arguments)


# isinstance asks an object's type first and then its __class__: the last base of a type answers the second question.
# (A class that inherits from both libraries' has two states to keep, and transformers' tokenizers need their own.)
Claim: type = type(
    "Claim",
    (),
    {
        "__doc__": "A base of what passes for transformers'.",
        "__class__": property(lambda self: _claimed(type(self)), lambda self, kind: _TYPE.__set__(self, kind)),
        "__reduce_ex__": _reduce,
        "__module__": __name__,
    },
)


@cache
def _claimed(kind: type) -> type:
    """transformers' class of the same name as `kind` or one of its bases, else the general one."""
    general = next(_named(name) for ours, name in _KINDS.items() if issubclass(kind, ours))
    assert general is not None
    for base in kind.__mro__:
        found = _named(base.__name__)
        if found is not None and issubclass(found, general):
            return found
    return general


def _named(name: str) -> type | None:
    for home in _HOMES:
        found = getattr(importlib.import_module(home), name, None)
        if isinstance(found, type):
            return found
    return None
