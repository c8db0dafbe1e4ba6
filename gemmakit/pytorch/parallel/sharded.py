"""A model whose parameters are shared out over processes (FSDP2), and checkpoints of one that any number of them reads.

Every process calls the functions here, in the same order. Files in the layout of the Hub are read and written as ever:
`from_pretrained` maps the file, of which `shard_model` then copies this process's part alone, and `save_pretrained`
gathers one tensor at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gemmakit.checkpoint import save_checkpoint
from gemmakit.checkpoint.arrays import LazyTensor
from gemmakit.checkpoint.save import written_order
from gemmakit.dtypes import dtype_name
from gemmakit.errors import CheckpointError, InputError
from gemmakit.pytorch.parallel import processes

M = TypeVar("M", bound=nn.Module)
# What DCP writes last: a folder without it is no checkpoint.
_WHOLE = ".metadata"


# -- the model ---------------------------------------------------------------------------------------------------------


def shard_model(
    model: M, mesh: Any = None, *, compute_dtype: torch.dtype | None = None, reduce_dtype: torch.dtype | None = None
) -> M:
    """Let each process keep its part of every parameter; a layer is whole only while it runs. The model comes back.

    A tied head stays tied. Afterwards make the optimizer, which then keeps its part of the moments alone.

    Args:
        model: loaded or made alike in every process; as `from_pretrained` maps it, it takes no memory until here.
        mesh: a DeviceMesh of one dimension (shard), or of two (replicate, shard); by default all processes shard.
        compute_dtype: what layers are gathered in and run in, with parameters and moments as they are.
        reduce_dtype: what gradients are summed in; by default compute_dtype.

    Raises:
        InputError: a model that is split by a tensor plan, or has offloaded weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(model.parameters()).device
    if device.type == "meta":
        raise InputError("the model has no weights here (they are on 'meta'): load it in every process first.")
    processes.require_whole(model, "load it without tp_plan to shard it for training")
    processes.join(device)
    if not processes.joined():
        raise InputError("shard_model is of processes that torchrun started: torchrun --nproc-per-node 2 script.py.")
    mesh = mesh or init_device_mesh(device.type, (processes.size(),))
    told: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(compute_dtype, reduce_dtype)}
    base: Any = getattr(model, "base_model", model)
    for layer in base.layers:
        fully_shard(layer, **told)
    fully_shard(model, **told)
    return model


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of these is a part of one."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors.values())


def gathered(tensor: Any) -> Tensor:
    """The whole of a tensor, on the CPU, in every process; all of them call this."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu()


# -- one checkpoint, in the layout of the Hub --------------------------------------------------------------------------


def save_together(
    tensors: Mapping[str, Tensor],
    directory: Path,
    *,
    max_shard_size: int | str,
    extra_files: Mapping[str, bytes | str],
) -> None:
    """As `save_checkpoint`, of tensors of which each process has a part: the first writes, one tensor at a time.

    Raises CheckpointError in every process where the first could not write.
    """
    lazy = {name: LazyTensor(dtype_name(t.dtype), tuple(t.shape), partial(gathered, t)) for name, t in tensors.items()}
    pending = written_order(lazy, max_shard_size)
    failure: Exception | None = None
    if processes.rank() == 0:

        def load(name: str) -> Tensor:
            assert name == pending.pop(0), name
            return gathered(tensors[name])

        mine = {name: LazyTensor(t.dtype, t.shape, partial(load, name)) for name, t in lazy.items()}
        try:
            save_checkpoint(mine, directory, max_shard_size=max_shard_size, extra_files=extra_files)
        except Exception as error:
            failure = error
    for name in pending:  # the others gather in any case, and wait for this one
        gathered(tensors[name])
    said = processes.shared(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if said is not None:
        raise CheckpointError(said)


# -- a checkpoint of parts ---------------------------------------------------------------------------------------------


def save_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module | None,
    optimizer: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, and an optimizer, each process its part (DCP): any other number of processes reads it.

    The folder is there whole or not at all. extra: more tensors, of which each process has its part too or all of them
    the same, and plain values. model: None where that is all.
    Raises InputError for a folder that is there, CheckpointError where the disk refuses.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    target = Path(folder).expanduser()
    if processes.shared(target.exists()):
        raise InputError(f"{target} exists: name a new folder, such as one a step.")
    staged = target.with_name(f".{target.name}.part")
    if processes.rank() == 0:
        shutil.rmtree(staged, ignore_errors=True)  # what a kill left
    processes.wait()
    try:
        save(_state(model, optimizer, extra), checkpoint_id=staged)
        if processes.rank() == 0:
            os.replace(staged, target)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(f"{target} cannot be written: {error}. What was saved before is as it was.") from error
    processes.wait()


def load_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module | None,
    optimizer: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Read what `save_sharded` wrote, by whatever number of processes, into a model and an optimizer of the same form.

    extra: by the names it was saved under, tensors that are filled, and values that stand for others; it comes back
    with what was read. Raises CheckpointError for a folder that is no whole checkpoint, or of another form.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    source = Path(folder).expanduser()
    if not (source / _WHOLE).is_file():
        raise CheckpointError(f"{source} is no checkpoint of save_sharded: there is no {_WHOLE} in it.")
    state = _state(model, optimizer, extra)
    try:
        load(state, checkpoint_id=source)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"{source} does not fit this model: {error}") from error
    if model is not None:
        set_model_state_dict(model, state["model"])
    if model is not None and optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return state["extra"]


def _state(model: nn.Module | None, optimizer: Any, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is stored: tensors by their modules' names, an optimizer's by the parameters'."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state: dict[str, Any] = {"extra": dict(extra or {})}
    if model is not None:
        state["model"] = get_model_state_dict(model)
    if model is not None and optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state
