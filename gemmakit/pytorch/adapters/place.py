"""Putting an adapter around a model's modules, finding it there, and folding it into the weights."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from gemmakit.errors import InputError
from gemmakit.pytorch.adapters.config import ALL_LINEAR, LoraConfig
from gemmakit.pytorch.adapters.modules import AdaptedEmbedding, AdaptedLinear, Adapter
from gemmakit.pytorch.methods import ModelMethods
from gemmakit.pytorch.parallel.processes import require_whole


def add_adapter(model: ModelMethods, config: LoraConfig) -> list[str]:
    """Put fresh adapters around the modules that `config` targets; the names of these modules.

    All other parameters are frozen. A is drawn from torch's generator, B is zero: the model computes what it did.
    Raises InputError where there is an adapter already, nothing that `config` names, or among it what cannot have one;
    the model is then as it was.
    """
    if adapters_of(model):
        raise InputError("the model has an adapter already: merge_adapter it first, or load the model again.")
    require_whole(model, "merge the adapter first (gemmakit merge), and load that")
    modules: dict[str, nn.Module] = dict(model.named_modules())
    names = targets_of(model, config)
    for name in names:
        _check_target(name, modules[name], config)
    made = {name: _around(name, modules[name], config) for name in names}
    model.requires_grad_(False)
    for name, new in made.items():
        model.set_submodule(name, new.train(modules[name].training))
    return names


def _check_target(name: str, module: nn.Module, config: LoraConfig) -> None:
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise InputError(f"{name} is a {type(module).__name__}; adapters go around projections and embeddings.")
    if isinstance(module, nn.Embedding) and config.use_dora:
        raise InputError(f"{name} is an embedding: DoRA is for projections, so leave one of them out.")


def _around(name: str, module: nn.Module, config: LoraConfig) -> Adapter:
    r, scaling = config.rank(name), config.scaling(name)
    if isinstance(module, nn.Embedding):
        return AdaptedEmbedding(module, r, scaling, config.lora_dropout)
    assert isinstance(module, nn.Linear)
    return AdaptedLinear(module, r, scaling, config.lora_dropout, config.use_dora)


def targets_of(model: ModelMethods, config: LoraConfig) -> list[str]:
    """The names of the modules that `config` puts an adapter around. Raises InputError where there is none."""
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    if config.target_modules == ALL_LINEAR:
        return [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
    names = [name for name in modules if name and config.targets(name)]
    if not names:
        ends = sorted(
            {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear | nn.Embedding)}
        )
        raise InputError(f"no module is called {config.target_modules!r}; there are {', '.join(ends)}.")
    return names


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters by the names of the modules that they stand around."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def remove_adapter(model: ModelMethods) -> dict[str, Adapter]:
    """Take the adapters out, so that the model is as without; they are returned by the names of their modules."""
    found = adapters_of(model)
    for name, adapter in found.items():
        model.set_submodule(name, adapter.base_layer.train(adapter.training))
    return found


@contextmanager
def as_it_was(model: ModelMethods) -> Generator[None]:
    """What fails within leaves the model without the adapters that it put in, and with what was learnt before."""
    held, learnt = adapters_of(model), [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        if not held:
            remove_adapter(model)
        for parameter, flag in learnt:
            parameter.requires_grad_(flag)
        raise


@torch.no_grad()
def merge_adapter(model: ModelMethods) -> None:
    """Fold the adapters into the weights, rounded once to their dtype, and take the modules out: as fast as before.

    Where an adapter is on an embedding or a head that share one weight, the two have a weight each afterwards.
    Raises InputError for quantized weights, which hold codes.
    """
    found = adapters_of(model)
    for name, adapter in found.items():
        if not adapter.weight.is_floating_point():
            raise InputError(
                f"{name} holds codes of a quantized weight, into which an adapter cannot be folded: load the model "
                "without quantization, merge, and quantize the result."
            )
    weights = {name: adapter.merged_weight() for name, adapter in found.items()}
    remove_adapter(model)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(adapter.base_layer is end for adapter in found.values() for end in ends):
        model.untie_weights()
    for name, weight in weights.items():
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
