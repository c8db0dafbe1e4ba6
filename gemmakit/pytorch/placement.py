"""Where a model's weights go: one device, or several with the accelerate package, CPU memory and disk included."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gemmakit.errors import InputError, MissingDependency

DeviceMap = str | int | torch.device | Mapping[str, Any] | None
MaxMemory = Mapping[Any, int | str] | None
# How accelerate may share layers out.
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def one_device(device_map: DeviceMap, max_memory: MaxMemory, nbytes: int) -> torch.device | None:
    """The device that takes the whole model, of `nbytes` bytes of weights; None if it is to be spread over several.

    Raises InputError for a device that is not there, in max_memory too.
    """
    _refuse_absent(max_memory or {})
    if isinstance(device_map, Mapping):
        places = {str(place) for place in device_map.values()}
        return (
            parse_device(next(iter(device_map.values())), "device_map")
            if len(places) == 1 and places != {"disk"}
            else None
        )
    if isinstance(device_map, str) and device_map in SPREADS:
        if max_memory is not None or device_map != "auto":
            return None
        device = parse_device("auto")
        fits = device.type != "cuda" or nbytes <= torch.cuda.mem_get_info(device)[0]
        return device if fits or not _installed() else None
    return parse_device(device_map, "device_map")  # type: ignore[arg-type]


def _refuse_absent(places: Mapping[Any, int | str]) -> None:
    count = torch.accelerator.device_count()
    absent = [place for place in places if isinstance(place, int) and place >= count]
    if absent:
        raise InputError(
            f"max_memory names device {absent[0]}, and torch sees {count} accelerators. Leave it out, or name 'cpu'."
        )


def parse_device(device: str | int | torch.device | None, name: str = "device") -> torch.device:
    """The torch device that is meant; `name` is the argument that errors speak of.

    device: a device or its name; the number of an accelerator, also as text, or -1 for the CPU; "auto" for the first
    accelerator if there is one; None for where torch puts tensors now. Raises InputError for one that is not there.
    """
    if device is None:
        return torch.get_default_device() if torch.get_default_device().type != "meta" else torch.device("cpu")
    if device == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if isinstance(device, str) and device.lstrip("-").isdigit():
        device = int(device)
    try:
        found = torch.device("cpu" if device == -1 else device)
    except RuntimeError as e:
        if isinstance(device, int):
            raise InputError(f"device {device} asks for an accelerator, and torch sees none. Use 'cpu'.") from e
        spreads = f", {', '.join(map(repr, SPREADS[1:]))} or {{module: device}}" if name == "device_map" else ""
        raise InputError(
            f"{name} is {device!r}: there is no such device. Give 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', a number"
            f"{spreads}."
        ) from e
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        seen = f"{count or 'no'} CUDA device{'s' * (count > 1)}"
        raise InputError(f"{name} {device!r} asks for CUDA, and torch sees {seen}. Use 'cpu'.")
    return found


def spread(
    model: Any, device_map: str | Mapping[str, Any], max_memory: MaxMemory, folder: str | os.PathLike[str] | None
) -> nn.Module:
    """Send the parts of a model in CPU memory to their devices; each then fetches its inputs by itself.

    Args:
        model: loaded, on the CPU.
        device_map: one of SPREADS, or {module name: device, "cpu" or "disk"}. What is on "cpu" or "disk" beside an
            accelerator is copied there for its turn.
        max_memory: {device: bytes or "10GiB"} for SPREADS.
        folder: for what goes to "disk".

    Raises:
        MissingDependency: accelerate is not installed.
        InputError: a map that leaves out modules, or sends some to disk without a folder.
    """
    if not _installed():
        raise MissingDependency(
            f"device_map={device_map!r} spreads a model over several devices, which needs accelerate: "
            "pip install 'accelerate>=1.0', or name one device."
        )
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import check_device_map, get_balanced_memory

    whole = model._no_split_modules
    if isinstance(device_map, str):
        memory: Any = None if max_memory is None else dict(max_memory)
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            memory = get_balanced_memory(model, memory, no_split_module_classes=whole, low_zero=low)
        device_map = infer_auto_device_map(model, memory, no_split_module_classes=whole)
    places = dict(device_map)
    try:
        check_device_map(model, places)
    except ValueError as e:
        raise InputError(f"device_map does not place every weight: {e}") from e
    if "disk" in places.values() and folder is None:
        raise InputError('device_map sends modules to "disk": say where with offload_folder=.')
    return dispatch_model(model, places, offload_dir=folder, force_hooks="disk" in places.values())


def _installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("accelerate") is not None
