"""Where a run's numbers go beside its folder: TensorBoard, trackio, wandb, each imported when it is asked for alone."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from gemmakit.errors import InputError, MissingDependency

PROJECT = "gemmakit"
# Each by the package that it needs.
TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


class Tracker(Protocol):
    """Takes numbers by name, a step after another."""

    def put(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in the run's folder; what a run that died wrote after `step`, or before its first save, is hidden."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int):
        module: Any = import_module("torch.utils.tensorboard")
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)
        self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()), step)

    def put(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Service:
    """wandb, and trackio, which has its functions: a run by its folder's name and what it is known by."""

    def __init__(self, package: str, folder: Path, settings: Mapping[str, Any], begun: int):
        self.module: Any = import_module(package)
        known = _known_by(folder, begun)
        own = {} if package == "trackio" else {"dir": str(folder), "id": known}
        self.module.init(
            project=PROJECT, name=f"{folder.name}-{known[:6]}", config=dict(settings), resume="allow", **own
        )

    def put(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


def _known_by(folder: Path, begun: int) -> str:
    """Of a folder and when its run was begun: a run that goes on goes on there too."""
    return hashlib.sha256(f"{folder.resolve()} {begun}".encode()).hexdigest()[:16]


class Trackers:
    """Those that a run asked for. One that fails later is told of and left out: it costs the run nothing.

    begun: when the run was, in ns. step: how far it has come. Raises InputError for one that does not begin; none runs
    then.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], begun: int, step: int = 0):
        self.running: dict[str, Tracker] = {}
        try:
            for name in sorted(names, key="tensorboard".__eq__):  # last: it writes to the folder
                self.running[name] = _begun(name, folder, settings, begun, step)
        except BaseException:
            self.close()
            raise

    def put(self, record: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in record.items() if name != "step"}
        for name in list(self.running):
            self._try(name, lambda tracker: tracker.put(record["step"], values))

    def close(self) -> None:
        for name in list(self.running):
            self._try(name, lambda tracker: tracker.close())

    def _try(self, name: str, do: Callable[[Tracker], None]) -> None:
        try:
            do(self.running[name])
        except Exception as error:  # a service's own kinds, a network that is gone, a full disk
            del self.running[name]
            warnings.warn(f"{name} takes no more numbers of this run, which goes on: {error}", stacklevel=4)


def _begun(name: str, folder: Path, settings: Mapping[str, Any], begun: int, step: int) -> Tracker:
    try:
        if name == "tensorboard":
            return _TensorBoard(folder, settings, step)
        return _Service(TRACKERS[name], folder, settings, begun)
    except Exception as error:  # each has its own kinds
        raise InputError(f"--track {name} does not begin: {error}") from error


def check_trackers(names: Sequence[str]) -> None:
    """Raises MissingDependency for one whose package is not there."""
    for name in names:
        if find_spec(TRACKERS[name]) is None:
            raise MissingDependency(f"--track {name} needs the package {TRACKERS[name]}: pip install {TRACKERS[name]}.")
