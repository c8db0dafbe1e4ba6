"""The processes that run a model together: how one joins the others, and what it says to them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gemmakit.errors import InputError

T = TypeVar("T")
# A process that has died is seen at once; one that has nothing to say, as of a server at night, is waited for.
_PATIENCE = timedelta(days=30)
# What torchrun tells each process.
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def joined() -> bool:
    """Whether this process is one of several already."""
    return dist.is_available() and dist.is_initialized()


def join(device: torch.device | None = None) -> None:
    """Meet the processes that torchrun started beside this one, unless that is done; alone where nothing was started.

    device: where this one computes; on CUDA they talk by NCCL, else by gloo. Raises InputError where some of what
    torchrun tells is missing.
    """
    if joined():
        return
    missing = [name for name in _TOLD if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise InputError(f"RANK is set and {', '.join(missing)} not: start the processes with torchrun.")
    if not missing:
        on_cuda = device is not None and device.type == "cuda"
        if device is not None and on_cuda:
            torch.cuda.set_device(local_device(device))
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_PATIENCE)


def leave() -> None:
    """Let go of the others. What was asked of them has ended."""
    if joined():
        dist.destroy_process_group()


def rank(group: Any = None) -> int:
    """Which of the processes this is, counted from 0."""
    return dist.get_rank(group) if joined() else 0


def size(group: Any = None) -> int:
    """How many there are."""
    return dist.get_world_size(group) if joined() else 1


def local_device(device: torch.device) -> torch.device:
    """Of a machine's accelerators the one for this process, where the kind of device alone was named."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def shared(value: T, group: Any = None) -> T:
    """What the first process has, given to all. It must be picklable; every process calls this."""
    if size(group) == 1:
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, group_src=0, group=group)
    return held[0]


def wait(group: Any = None) -> None:
    """Until every process is here."""
    if joined():
        dist.barrier(group)
