"""pipeline(): from texts to results in one call. A task is a small class: how one input looks, how a batch is run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemmakit.auto import AutoTokenizer
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.hub import HubOptions, demo_model
from gemmakit.pipelines.base import Pipeline, is_flax
from gemmakit.pipelines.classification import TextClassificationPipeline, TokenClassificationPipeline
from gemmakit.pipelines.embedding import EmbeddingModel
from gemmakit.pipelines.features import FeatureExtractionPipeline
from gemmakit.pipelines.generation import DEFAULT_NEW_TOKENS, TextGenerationPipeline
from gemmakit.pytorch.adapters import load_adapter, merge_adapter
from gemmakit.pytorch.placement import parse_device

__all__ = [
    "ALIASES",
    "DEFAULT_NEW_TOKENS",
    "TASKS",
    "EmbeddingModel",
    "FeatureExtractionPipeline",
    "Pipeline",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TokenClassificationPipeline",
    "find_task",
    "pipeline",
]

TASKS: dict[str, type[Pipeline]] = {
    made.task: made
    for made in (
        TextGenerationPipeline,
        TextClassificationPipeline,
        TokenClassificationPipeline,
        FeatureExtractionPipeline,
    )
}
# Arguments of the model's from_pretrained that need no model_kwargs around them.
LOADING = ("attn_implementation", "ignore_mismatched_sizes", "max_memory", "offload_folder", "quantization_config",
           "tp_plan")  # fmt: skip
ALIASES = {"sentiment-analysis": TextClassificationPipeline.task, "ner": TokenClassificationPipeline.task}


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: GemmaConfig | str | None = None,
    tokenizer: Any = None,
    *,
    framework: str | None = None,
    use_fast: bool = True,
    device: int | str | torch.device | None = None,
    device_map: int | str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    trust_remote_code: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    pipeline_class: type[Pipeline] | None = None,
    adapter: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """Load what a task needs and give back something to call.

    Args:
        task: "text-generation" (None means it), "text-classification" (or "sentiment-analysis"),
            "token-classification" (or "ner"), or "feature-extraction".
        model: a folder, a Hub id, or a loaded model. None takes the demo model that gemmakit carries, which generates.
        config: instead of the checkpoint's config.json.
        framework: "pt" or "flax"; None takes that of a loaded model, and PyTorch to load one. With Flax the device is
            JAX's first (JAX_PLATFORMS chooses), and settings that its compiled loop lacks are refused.
        tokenizer: a loaded one or where to find it; None takes the model's.
        device: "cpu", "cuda", "cuda:1", a torch.device, or a CUDA index (-1: the CPU). device_map: the same, or "auto".
            With neither, the first accelerator if there is one.
        dtype: "auto", the default, keeps what the checkpoint holds. `torch_dtype` is the older name of the same.
        model_kwargs: more arguments for the model's from_pretrained; attn_implementation, quantization_config and
            those of offloading may also stand by themselves.
        adapter: a folder that `gemmakit tune` or peft wrote, for a model that is loaded here. It is folded into the
            weights; beside quantized ones it runs as it is.
        kwargs: revision, token, cache_dir, local_files_only, subfolder; batch_size; and defaults for the calls.

    Raises:
        InputError: an unknown task, or arguments that contradict each other; everything that loading raises.
    """
    made = pipeline_class or find_task(task)
    if framework not in (None, "pt", "flax"):
        raise InputError(f"framework is {framework!r}; it must be 'pt' (PyTorch) or 'flax'.")
    if device is not None and device_map is not None:
        raise InputError("device and device_map are both given: give one of them.")
    hub = HubOptions.take(kwargs)
    more = {**(model_kwargs or {}), **{name: kwargs.pop(name) for name in LOADING if name in kwargs}}
    if model is None and made.task != TextGenerationPipeline.task:
        raise InputError(f"{made.task} needs model=: a folder, a Hub id or a loaded model. The demo model generates.")
    source = demo_model() if model is None else model
    if isinstance(source, (str, Path)):
        loading = {**vars(hub), **more, "trust_remote_code": trust_remote_code}
        if config is not None:
            loading["config"] = (
                config if isinstance(config, GemmaConfig) else GemmaConfig.from_pretrained(config, **vars(hub))
            )
        chosen = torch_dtype if dtype is None else dtype
        if framework == "flax":
            source = _load_flax(made, source, chosen, device_map if device is None else device, loading)
        else:
            placed = device_map or "auto" if device is None else parse_device(device)
            source = made.model_class.from_pretrained(source, device_map=placed, dtype=chosen, **loading)
        device = None
    elif any(x is not None for x in (config, dtype, torch_dtype, device_map, adapter, more or None)) or (
        hub != HubOptions()
    ):
        raise InputError(
            "config, dtype, device_map, model_kwargs, quantization_config, revision and adapter are for loading; this "
            "model is loaded. gemmakit.pytorch.adapters.load_adapter puts an adapter around its modules."
        )
    elif framework is not None and (framework == "flax") != is_flax(source):
        raise InputError(f"framework is {framework!r}, but the model is a {type(source).__name__}.")
    if adapter is not None:
        _adapt(source, adapter)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_source(tokenizer, source), use_fast=use_fast, **vars(hub))
    return made(source, tokenizer, device=device, **kwargs)


def _adapt(model: Any, adapter: str | Path) -> None:
    if is_flax(model):
        raise InputError(
            "adapter= is of PyTorch models: merge it (gemmakit merge), and load what that writes with Flax."
        )
    load_adapter(model, adapter)
    if not model.is_quantized:
        merge_adapter(model)


def _load_flax(made: type[Pipeline], name: str | Path, dtype: Any, device: Any, loading: dict[str, Any]) -> Any:
    if made.flax_class is None:
        raise InputError(f"{made.task} has no Flax model: leave framework out.")
    if device not in (None, "auto"):
        raise InputError(f"device is {device!r}; with framework='flax' JAX chooses it: set JAX_PLATFORMS instead.")
    home = importlib.import_module("gemmakit.flax")  # by name: the layers below need not have jax
    return getattr(home, made.flax_class).from_pretrained(name, dtype or "auto", **loading)


def find_task(name: str | None) -> type[Pipeline]:
    """The class of a task; None means text-generation. Raises InputError for a name that is none."""
    name = name or TextGenerationPipeline.task
    found = TASKS.get(ALIASES.get(name, name))
    if found is None:
        raise InputError(f"there is no task {name!r}; gemmakit has {', '.join(TASKS)}.")
    return found


def _tokenizer_source(tokenizer: str | Path | None, model: Any) -> str | Path:
    name = tokenizer or getattr(model, "name_or_path", "")
    if not name:
        raise InputError("this model was not loaded from anywhere, so its tokenizer is not known: pass tokenizer=.")
    return name
