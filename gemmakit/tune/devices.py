"""A run in several processes: each has its part of the weights and of every pass's rows; numbers are those of one.

Every process draws, reads and decides the same; what only one may do, writing above all, the first does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gemmakit.errors import GemmakitError, InputError
from gemmakit.pytorch.parallel import processes
from gemmakit.pytorch.parallel.sharded import shard_model

T = TypeVar("T")


def running() -> int:
    """How many processes were started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return processes.rank() == 0


def meet(devices: int, device: torch.device) -> None:
    """Join the other processes. Raises InputError where others run than were asked for."""
    if running() != devices:
        raise InputError(
            f"devices is {devices}, but {running()} processes run: gemmakit tune --devices {devices} starts them "
            f"itself, as does torchrun --nproc-per-node {devices}."
        )
    if devices > 1:
        processes.join(device)


def by_first(do: Callable[[], T]) -> T | None:
    """Let the first process do what only one may; what it raises, all raise. What comes of it, in the first alone."""
    failure: GemmakitError | None = None
    made: T | None = None
    if is_first():
        try:
            made = do()
        except GemmakitError as error:
            failure = error
    said = processes.shared(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if said is not None:
        raise InputError(said)
    return made


def split(model: Any) -> Any:
    """Share the weights out (FSDP2). Gradients are summed: each process has its part of one mean."""
    from torch.distributed.fsdp import FSDPModule

    shard_model(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gloo has no average, and sums where it is asked for one
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def of_first(value: T) -> T:
    """What the first process has, in all of them."""
    return processes.shared(value)


def own(units: Sequence[int]) -> list[int]:
    """This process's part of what a pass learns from."""
    return list(units[processes.rank() :: processes.size()])


def summed(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Numbers of all processes, added up."""
    if not processes.joined():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether any process says so."""
    return summed([flag], device)[0] > 0


def local(device: torch.device) -> torch.device:
    return processes.local_device(device)


def part(tensor: Tensor) -> Tensor:
    """What this process has of it, in the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process; all of them call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, shared out as another is; of one that is shared out, itself."""
    if hasattr(tensor, "to_local"):
        return tensor
    if not hasattr(like, "to_local"):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def shared_out(local: Tensor, like: Tensor) -> Tensor:
    """This process's part as such a part, of a tensor that is shared out as another is; itself where none is."""
    if not hasattr(like, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    whole: Any = like
    told: dict[str, Any] = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(local, whole.device_mesh, whole.placements, **told)
