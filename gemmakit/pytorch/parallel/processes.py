"""The processes that run a model together: how one joins the others, and what it says to them."""

from __future__ import annotations

import atexit
import os
import socket
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
_LOOPBACK = ("127.0.0.1", "localhost")


def joined() -> bool:
    """Whether this process is one of several already."""
    return dist.is_available() and dist.is_initialized()


def join(device: torch.device | None = None) -> None:
    """Meet the processes that torchrun started beside this one, unless that is done; alone where nothing was started.

    device: where this one computes; on CUDA they talk by NCCL, else by gloo. Where MASTER_ADDR is the loopback, so is
    what they listen on. Raises InputError where some of what torchrun tells is missing.
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
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_PATIENCE, **_meeting())
        if not on_cuda:  # gloo's threads, left running, may abort a process that ends
            atexit.register(leave)


def _meeting() -> dict[str, Any]:
    """How to meet: as torchrun says, but processes of one machine listen on no address that others reach.

    What they send each other is pickled. torch would have the first listen on every address, and gloo on the host's.
    """
    if os.environ["MASTER_ADDR"] not in _LOOPBACK:
        return {}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for name in loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens itself
        return {}
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    listening: dict[str, Any] = {}
    if rank == 0:
        with socket.create_server(("127.0.0.1", port), backlog=max(128, size)) as server:
            listening["master_listen_fd"] = server.detach()  # the store's from here on
    told: dict[str, Any] = {"timeout": _PATIENCE, "wait_for_workers": False, **listening}
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, **told)  # pyright: ignore[reportPrivateImportUsage]
    return {"store": store, "rank": rank, "world_size": size}


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


def require_whole(model: Any, instead: str) -> None:
    """Raises InputError for a model that a tensor plan has split, of which `instead` says what is to be done."""
    plan = getattr(model, "tensor_parallel", None)
    if plan is not None:
        raise InputError(f"this is a part of a model that a tensor plan has split ({plan}): {instead}.")
