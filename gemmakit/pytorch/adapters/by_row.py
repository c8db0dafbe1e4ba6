"""Adapters of which each request of a batch chooses its own."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

from gemmakit.errors import InputError
from gemmakit.pytorch.adapters.files import load_adapter
from gemmakit.pytorch.adapters.modules import AdaptedLinear, Adapter
from gemmakit.pytorch.adapters.place import adapters_of, as_it_was, remove_adapter
from gemmakit.pytorch.methods import ModelMethods
from gemmakit.pytorch.row_adapters import RowAdaptedLinear, RowAdapters, Update, row_adapters


def load_adapters(model: ModelMethods, folders: Mapping[str, str | os.PathLike[str]]) -> None:
    """Put the adapters of folders around the model's projections, for requests to choose by name; none is chosen.

    folders: name -> folder. The weights beneath, quantized ones too, are shared. Raises what `load_adapter` raises, and
    InputError for an adapter of an embedding or a head; the model is then as it was.
    """
    if row_adapters(model) is not None or adapters_of(model):
        raise InputError("the model has an adapter already: load it again, and give all adapters at once.")
    adapters, updates = RowAdapters(folders), dict[str, dict[int, Update]]()
    with as_it_was(model):
        for place, folder in enumerate(folders.values()):
            load_adapter(model, folder)
            for name, adapter in remove_adapter(model).items():
                updates.setdefault(name, {})[place] = _update(name, adapter, model, folder)
    for name, held in updates.items():
        base: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        model.set_submodule(name, RowAdaptedLinear(base, adapters, held).train(base.training))


@torch.no_grad()
def _update(name: str, adapter: Adapter, model: ModelMethods, folder: str | os.PathLike[str]) -> Update:
    if not isinstance(adapter, AdaptedLinear) or adapter.base_layer is model.get_output_embeddings():
        raise InputError(
            f"the adapter {folder} is on {name} too, which requests share: run it alone, without a name, or gemmakit "
            "merge it."
        )
    A, B, factor = adapter.lora_A.detach(), adapter.lora_B.detach() * adapter.scaling, adapter.factor()
    return Update(A, B) if factor is None else Update(A, factor[:, None] * B, factor - 1)
