"""The Auto classes: the Gemma class for a checkpoint, by task. Each refuses what is no Gemma, saying what is."""

from __future__ import annotations

import copy
import importlib
import os
from pathlib import Path
from typing import Any, ClassVar

from gemmakit.checkpoint.readahead import read_ahead, weights_at
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, InputError
from gemmakit.family import TEXT_OF, kind_of
from gemmakit.files import read_json_object
from gemmakit.hub import HubOptions, find_file, refuse_code
from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast

Name = str | os.PathLike[str]


class _Auto:
    def __init__(self, *_: Any, **__: Any):
        raise InputError(f"{type(self).__name__} is not made directly: use {type(self).__name__}.from_pretrained(...).")


class AutoConfig(_Auto):
    """`GemmaConfig` for a checkpoint."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Name, **kwargs: Any) -> GemmaConfig:
        """As `GemmaConfig.from_pretrained`. Raises ConfigError for another model_type than Gemma's."""
        refuse_code(kwargs)
        return GemmaConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_model(cls, model_type: str, **kwargs: Any) -> GemmaConfig:
        """A configuration from its fields. Raises ConfigError for another model_type than Gemma's."""
        return GemmaConfig.from_dict({"model_type": model_type}, **kwargs)


class AutoTokenizer(_Auto):
    """`GemmaTokenizerFast`, or `GemmaTokenizer` with `use_fast=False`."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Name, *inputs: Any, use_fast: bool = True, **kwargs: Any
    ) -> Any:
        """Load the tokenizer of a folder or a Hub id; other arguments as in `GemmaTokenizer.from_pretrained`.

        Raises ConfigError where config.json says that the checkpoint is no Gemma.
        """
        refuse_code(kwargs)
        if "gguf_file" not in kwargs and not Path(pretrained_model_name_or_path).is_file():
            _check_model_type(pretrained_model_name_or_path, HubOptions.take({**kwargs}))
        chosen = GemmaTokenizerFast if use_fast else GemmaTokenizer
        return chosen.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)


class _AutoModel(_Auto):
    _role: ClassVar[str]  # in `family.Kind.classes`

    @classmethod
    def _class(cls, model_type: str = GemmaConfig.model_type) -> Any:
        home = importlib.import_module("gemmakit")  # when used: a configuration or a tokenizer needs no torch
        return getattr(home, kind_of(model_type).classes[cls._role])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Name, **kwargs: Any) -> Any:
        """Load from a folder or a Hub id; arguments and errors as `GemmaPreTrainedModel.from_pretrained`.

        Raises ConfigError for another model_type than Gemma's, before any weight is read.
        """
        if kwargs.get("tp_plan") is None:  # while torch is imported
            read_ahead(weights_at(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return cls._class().from_pretrained(pretrained_model_name_or_path, **kwargs)  # which is every member's

    @classmethod
    def from_config(cls, config: GemmaConfig, *, dtype: Any = None, torch_dtype: Any = None, **kwargs: Any) -> Any:
        """A model with fresh weights. kwargs: attn_implementation."""
        refuse_code(kwargs)
        attention = kwargs.pop("attn_implementation", None)
        if kwargs:
            raise InputError(f"from_config has no argument {', '.join(kwargs)}: set fields in the configuration.")
        if attention is not None:
            config = copy.deepcopy(config)
            config.attn_implementation = attention
        model = cls._class(config.model_type)(config)
        from gemmakit.pytorch.pretrained import dtype_of

        chosen = dtype_of(dtype or torch_dtype or "auto")
        return model if chosen is None else model.to(chosen)


class AutoModel(_AutoModel):
    """`GemmaModel`: hidden states."""

    _role = "model"


class AutoModelForCausalLM(_AutoModel):
    """`GemmaForCausalLM`: next tokens."""

    _role = "causal_lm"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Name, **kwargs: Any) -> Any:
        """As the others. Raises InputError for a model whose tokens see what follows them and which has no head."""
        if "gguf_file" not in kwargs and Path(pretrained_model_name_or_path).is_dir():
            _refuse_encoder(pretrained_model_name_or_path, HubOptions.take({**kwargs}))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


class AutoModelForSequenceClassification(_AutoModel):
    """`GemmaForSequenceClassification`: one label or number a text."""

    _role = "sequence_classification"


class AutoModelForTokenClassification(_AutoModel):
    """`GemmaForTokenClassification`: a label a token."""

    _role = "token_classification"


def _refuse_encoder(name: Name, hub: HubOptions) -> None:
    stored = _stored(name, hub)
    made = stored.get("architectures") or []
    if stored.get("use_bidirectional_attention") in (True, "all") and made and not str(made[0]).endswith("ForCausalLM"):
        raise InputError(
            f"{str(name)!r} is a {made[0]} whose tokens see those after them: it cannot generate. "
            "Use EmbeddingModel for vectors, or AutoModel for hidden states."
        )


def _stored(name: Name, hub: HubOptions) -> dict[str, Any]:
    """What config.json says; nothing where there is none, or a damaged one, which is for the model to refuse."""
    path = find_file(name, "config.json", hub, optional=True)
    try:
        return {} if path is None else read_json_object(path)
    except CheckpointError:
        return {}


def _check_model_type(name: Name, hub: HubOptions) -> None:
    kind = _stored(name, hub).get("model_type", "gemma")
    kind_of(TEXT_OF.get(kind, kind) if isinstance(kind, str) else kind)
