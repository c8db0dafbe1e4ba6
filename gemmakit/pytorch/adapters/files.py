"""An adapter in PEFT's files: adapter_config.json and adapter_model.safetensors. peft reads ours, this reads peft's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmakit.checkpoint.formats.gguf import gguf_name
from gemmakit.checkpoint.formats.gguf_writing import write_gguf_adapter
from gemmakit.checkpoint.formats.safetensors import SafetensorsFile
from gemmakit.checkpoint.layout import tensor_shapes
from gemmakit.checkpoint.save import save_file
from gemmakit.config import GemmaConfig
from gemmakit.errors import CheckpointError, InputError, UnsafeFile
from gemmakit.files import read_json_object, write_text
from gemmakit.pytorch.adapters.config import LoraConfig
from gemmakit.pytorch.adapters.modules import Adapter
from gemmakit.pytorch.adapters.place import adapters_of, add_adapter, as_it_was, targets_of
from gemmakit.pytorch.methods import ModelMethods
from gemmakit.pytorch.parallel import processes
from gemmakit.pytorch.parallel.sharded import gathered

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
Name = str | os.PathLike[str]


def save_adapter(model: ModelMethods, config: LoraConfig, folder: Name, base: Name = "") -> None:
    """Write the model's adapter; each file is the old or the new, whole. base: what it is for, a folder or a Hub id.

    Of a sharded model every process calls this, and the first writes.
    """
    folder = Path(folder)
    tensors = {
        key: gathered(parameter).contiguous()
        for name, adapter in adapters_of(model).items()
        for key, parameter in _keys(name, adapter).items()
    }
    if processes.rank() > 0:
        return
    save_file(tensors, folder / WEIGHTS)
    settings = {"base_model_name_or_path": os.fspath(base) or None, **config.to_dict()}
    write_text(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load_adapter(model: ModelMethods, folder: Name) -> LoraConfig:
    """Put the adapter of a folder around the model's modules, in evaluation mode as the model is.

    Raises InputError for an adapter of another model or kind, CheckpointError for missing or damaged files, UnsafeFile
    where there is a pickle alone, which is never run; the model is then as it was.
    """
    folder = Path(folder).expanduser()
    config, stored = _read(folder)
    _check_ranks(model, config, stored, str(folder))
    with as_it_was(model):
        add_adapter(model, config)
        _fill(model, stored, str(folder))
    return config


@torch.no_grad()
def _fill(model: ModelMethods, stored: dict[str, Tensor], where: str) -> None:
    """The tensors of a file into the adapters of the model, which must be the same ones."""
    for name, adapter in adapters_of(model).items():
        _check_base(name, adapter, stored.pop(f"{_PREFIX}{name}.base_layer.weight", None), where)
    wanted = {key: p for name, adapter in adapters_of(model).items() for key, p in _keys(name, adapter).items()}
    _check(wanted, stored, where)
    for key, parameter in wanted.items():
        parameter.copy_(stored[key])
        parameter.requires_grad_(False)


def base_of(folder: Name) -> str | None:
    """The model that an adapter says it is for; None where it says none, or the folder holds no adapter."""
    path = Path(folder).expanduser() / CONFIG
    return read_json_object(path).get("base_model_name_or_path") if path.is_file() else None


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no adapter: there is no {CONFIG}. gemmakit tune and peft write one.")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise UnsafeFile(
                f"{folder} has {PICKLE}, a pickle, which can run code, and no {WEIGHTS}: it is not opened. Load it "
                "with peft where you trust it, and save it again."
            )
        raise CheckpointError(f"{folder} has {CONFIG} but no {WEIGHTS}: download or save it again.")
    settings = LoraConfig.from_dict(read_json_object(folder / CONFIG), str(folder / CONFIG))
    return settings, read_tensors(folder / WEIGHTS)


def adapter_to_gguf(folder: Name, out: Name, config: GemmaConfig) -> Path:
    """Write the adapter of a folder as a GGUF file for llama.cpp's --lora; its path. config: of the model it is for.

    Raises InputError for an adapter of another model, and for what llama.cpp's adapters cannot say: DoRA, and adapters
    of the embedding.
    """
    folder = Path(folder).expanduser()
    settings, stored = _read(folder)
    if settings.use_dora:
        raise InputError(
            f"{folder} is a DoRA, which GGUF adapters cannot say: gemmakit merge it, and convert the model."
        )
    tensors: dict[str, Tensor] = {}
    shapes = tensor_shapes(config)
    for key, tensor in stored.items():
        name, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        known = part in ("lora_A", "lora_B") and f"{name}.weight" in shapes
        theirs = gguf_name(f"{name}.weight", config.model_type) if known else None
        if theirs is None:
            raise InputError(
                f"{folder} adapts {name or key}, which a GGUF adapter of this model cannot: gemmakit merge it instead."
            )
        (O, I), r = shapes[f"{name}.weight"], settings.rank(name)
        _check_shape(key, tensor, (r, I) if part == "lora_A" else (O, r), str(folder))
        if key.replace(".lora_A.", ".lora_B.") not in stored or key.replace(".lora_B.", ".lora_A.") not in stored:
            raise InputError(f"the adapter {folder} is damaged: of {name} it has {part} alone. Download it again.")
        # llama.cpp scales all of them by alpha / rank.
        scale = settings.scaling(name) * settings.rank(name) / settings.lora_alpha if part == "lora_B" else 1.0
        tensors[f"{theirs}.{part.lower()}"] = tensor.float() * scale
    return write_gguf_adapter(out, config, settings.lora_alpha, tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError for a damaged one."""
    file = SafetensorsFile(path)
    try:
        return {name: file.tensor(name, "pt", "cpu") for name in file.tensors}
    finally:
        file.close()


def _keys(name: str, adapter: Adapter) -> dict[str, Any]:
    """The adapter's parameters by their keys in a file."""
    ends = {"lora_A": ".weight", "lora_B": ".weight"}
    return {f"{_PREFIX}{name}.{own}{ends.get(own, '')}": p for own, p in adapter.own().items()}


def _check_base(name: str, adapter: Adapter, weight: Tensor | None, where: str) -> None:
    """peft saves an embedding beside its adapter: it must be the model's."""
    own = adapter.weight
    if weight is not None and (weight.shape != own.shape or not torch.equal(weight.to(own.dtype), own.cpu())):
        raise InputError(
            f"the adapter {where} brings a weight of {name} that is not this model's, {tuple(weight.shape)} where it "
            f"has {tuple(own.shape)}: it was made for another model, or for one whose vocabulary was resized."
        )


def _check_ranks(model: ModelMethods, config: LoraConfig, stored: dict[str, Tensor], where: str) -> None:
    """Before anything is made by them: a settings file may name any number."""
    held = max((t.shape[0] for key, t in stored.items() if ".lora_A" in key or ".lora_embedding_A" in key), default=0)
    named = max(map(config.rank, targets_of(model, config)))
    if named > held:
        raise InputError(
            f"the adapter {where} is damaged: {CONFIG} says rank {named}, and the matrices of {WEIGHTS} have at most "
            f"{held}. Download or save it again."
        )


def _check(wanted: dict[str, Tensor], stored: dict[str, Tensor], where: str) -> None:
    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unknown:
        told = [f"it lacks {_some(missing)}"] if missing else []
        told += [f"it holds {_some(unknown)}, which the model has no place for"] if unknown else []
        raise InputError(f"the adapter {where} is not this model's: {'; '.join(told)}.")
    for key, parameter in wanted.items():
        _check_shape(key, stored[key], tuple(parameter.shape), where)


def _check_shape(key: str, stored: Tensor, wanted: tuple[int, ...], where: str) -> None:
    if tuple(stored.shape) != wanted:
        raise InputError(
            f"the adapter {where} is not this model's: {key} is {tuple(stored.shape)} there, but {wanted} here. It was "
            "made for another model or another rank."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
