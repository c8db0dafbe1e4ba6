"""Where a run stands, whole or as it was before: a kill at any moment costs the steps since.

Of one process it is a file, `state.safetensors`. Several that share the weights write a folder a step,
`state-STEP.parts`, each its part (DCP), so that none of them holds the whole. Any number of processes reads either.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmakit.checkpoint.formats.safetensors import SafetensorsFile
from gemmakit.checkpoint.save import save_file
from gemmakit.errors import CheckpointError
from gemmakit.pytorch.parallel.sharded import is_sharded, load_sharded, save_sharded
from gemmakit.tune import devices

NAME = "state.safetensors"
PARTS = "state-*.parts"
LEFT = (NAME, PARTS, f".{PARTS}.part")  # the last is what a kill leaves of one


@dataclass
class State:
    """step: steps done. skipped: of these, how many changed nothing. tensors: by name, random states among them.

    parts: the folder that holds skipped and tensors, where that is to be read by `read_parts`.
    """

    step: int
    skipped: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: Path | None = None


def save(folder: Path, state: State) -> None:
    """Every process calls this. Raises CheckpointError where the disk refuses; what was there is as it was."""
    if is_sharded(state.tensors):
        target = folder / PARTS.replace("*", f"{state.step:08d}")
        if not devices.of_first(target.exists()):  # else what a run that went on from before it had saved
            save_sharded(target, None, extra={"skipped": state.skipped, **state.tensors})
    else:
        target = folder / NAME
        devices.by_first(lambda: _save_whole(folder, state))
    devices.by_first(lambda: _remove_but(folder, target))


def _save_whole(folder: Path, state: State) -> None:
    told = json.dumps({"step": state.step, "skipped": state.skipped})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    save_file(tensors, folder / NAME, {"gemmakit.tune": told})


def _remove_but(folder: Path, kept: Path) -> None:
    for path in (path for pattern in LEFT for path in folder.glob(pattern)):
        if path != kept:
            remove(path)


def remove(path: Path) -> None:
    """A file, or a folder with what is in it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def load(folder: Path) -> State | None:
    """The newest there is, None where nothing was saved yet. Raises CheckpointError for a damaged file."""
    whole = _load_whole(folder) if (folder / NAME).is_file() else None
    steps = {int(path.name.partition("-")[2].partition(".")[0]): path for path in folder.glob(PARTS)}
    newest = max(steps, default=-1)
    if newest > (-1 if whole is None else whole.step):
        return State(newest, 0, parts=steps[newest])
    return whole


def read_parts(state: State, like: Mapping[str, Tensor], device: torch.device) -> State:
    """With the tensors of its folder, each as it is shared out in `like`, and random states.

    What the folder does not hold is left out, as moments are of what had no gradient yet.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if state.parts is None:
        return state
    try:
        names = FileSystemReader(state.parts).read_metadata().state_dict_metadata
    except Exception as error:  # it is a pickle, and fails as pickles do
        raise CheckpointError(f"{state.parts} is damaged: {error}. Begin anew with --overwrite.") from error
    wanted = {**like, **random_states(device)}
    wanted = {name: tensor for name, tensor in wanted.items() if f"extra.{name}" in names}
    found = load_sharded(state.parts, None, extra={"skipped": 0, **wanted})
    return State(state.step, found.pop("skipped"), found)


def _load_whole(folder: Path) -> State:
    file = SafetensorsFile(folder / NAME)
    try:
        told: Any = json.loads(file.metadata.get("gemmakit.tune", "{}"))
    except ValueError:
        told = None
    if not isinstance(told, dict) or not {"step", "skipped"} <= told.keys():
        raise CheckpointError(f"{folder / NAME} is not a state that gemmakit tune saved: begin anew with --overwrite.")
    try:
        tensors = {name: file.tensor(name, "pt", "cpu").clone() for name in file.tensors}
    finally:
        file.close()
    return State(told["step"], told["skipped"], tensors)


def random_states(device: torch.device) -> dict[str, Tensor]:
    found = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["random/cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_states(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["random/cpu"])
    if device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
