"""Where a run stands, in one file that is the old or the new, whole: a kill at any moment costs the steps since."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmakit.checkpoint.formats.safetensors import SafetensorsFile
from gemmakit.checkpoint.save import save_file
from gemmakit.errors import CheckpointError

NAME = "state.safetensors"


@dataclass
class State:
    """step: steps done. skipped: of these, how many changed nothing. tensors: by name, random states among them."""

    step: int
    skipped: int
    tensors: dict[str, Tensor]


def save(folder: Path, state: State) -> None:
    """Raises CheckpointError where the disk refuses; what was there is as it was."""
    told = json.dumps({"step": state.step, "skipped": state.skipped})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    save_file(tensors, folder / NAME, {"gemmakit.tune": told})


def load(folder: Path) -> State | None:
    """None where nothing was saved yet. Raises CheckpointError for a damaged file."""
    if not (folder / NAME).is_file():
        return None
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
