"""What is asked of a run: the keys of tune.toml, the flags of the command, and what is written beside the result."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from gemmakit.checks import FLAG, TEXT, OneOf, Real, Whole, check_fields
from gemmakit.errors import InputError
from gemmakit.tune.trackers import TRACKERS

METHODS = ("lora", "dora", "full")
LOSSES = ("sft", "dpo", "orpo")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Texts:
    """What a list of names, or a map of names to names, must be."""

    kind: type | tuple[type, ...]
    said: str

    def holds(self, value: Any) -> bool:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return isinstance(value, self.kind) and all(isinstance(part, str) and part for part in parts)

    def __str__(self) -> str:
        return self.said


class Names(OneOf):
    """A list of some of a few names."""

    def holds(self, value: Any) -> bool:
        return isinstance(value, tuple) and all(map(super().holds, value))

    def __str__(self) -> str:
        return f"a list of {', '.join(map(repr, self.values))}"


# What is read by some runs alone: the settings, whether a run reads them, and what the others are.
OWN: tuple[tuple[tuple[str, ...], Callable[[TuneSettings], bool], str], ...] = (
    (("rank", "alpha", "dropout", "targets", "quantization"), lambda s: s.method != "full", "training all weights"),
    (("freeze",), lambda s: s.method == "full", "adapters, beside which all weights are frozen"),
    (("beta",), lambda s: s.loss != "sft", "the loss sft"),
    (("train_on", "packing", "judge_rows"), lambda s: s.loss == "sft", "pairs of answers"),
    (("epochs",), lambda s: s.max_steps is None, "max_steps"),
    (
        ("quantization", "dropout", "neftune", "attention", "device", "devices", "loss_chunk"),
        lambda s: s.backend == "pytorch",
        "the backend flax",
    ),
)
# Where a run may differ from the one it goes on from: what decides neither what is computed nor in which order.
FREE = {"out", "save_steps", "eval_steps", "log_steps", "device", "devices", "track"}


@dataclass(frozen=True)
class TuneSettings:
    """Every setting of a run, each with its range.

    model, data, out: folders or a Hub id, a file or a folder of train, valid and test, and the folder of the result.
    method: "lora", "dora" or "full". quantization: of the frozen weights, as in from_pretrained: "int4", "int8".
    loss: "sft" on what is to be said; "dpo" and "orpo" on pairs of a chosen and a rejected answer, with `beta`.
    train_on: "assistant", what the model is to say, or "all", the prompts too.
    chat: prompt and completion are a question and its answer in the model's turns, not a text that goes on.
    columns: {what is read here: its name in the file}.
    max_length: tokens a row, the context if None. truncate: cut longer rows, which are else refused.
    max_steps: instead of epochs. batch_size: rows (packed: packs) a pass; accumulate: passes a step.
    lr: 2e-4, or 1e-5 for "full", if None. warmup: share of the steps. clip: of the gradient's length, 0 for none.
    freeze: parameters that "full" leaves alone, by a part of their names from dot to dot: "layers.0".
    neftune: arXiv:2310.05914's alpha.
    ema: decay of the average of the weights that is saved instead of the last ones; 0 for none.
    loss_chunk: positions whose logits exist at a time.
    backend: "pytorch", or "flax" for losses and gradients by JAX, on its own device.
    devices: processes that share the weights, and the rows of each pass.
    track: where the numbers go beside the folder: "tensorboard", "trackio", "wandb".

    Raises InputError for values out of range, and for what this run would not read.
    """

    model: Annotated[str, TEXT]
    data: Annotated[str, TEXT]
    out: Annotated[str, TEXT]
    method: Annotated[str, OneOf(*METHODS)] = "lora"
    quantization: str | None = None
    loss: Annotated[str, OneOf(*LOSSES)] = "sft"
    beta: Annotated[float, Real(0, above=True)] = 0.1
    train_on: Annotated[str, OneOf("assistant", "all")] = "assistant"
    chat: Annotated[bool, FLAG] = False
    columns: Annotated[dict[str, str], Texts(dict, "a map of names to names")] = field(default_factory=dict)
    max_length: Annotated[int | None, Whole(2)] = None
    truncate: Annotated[bool, FLAG] = False
    packing: Annotated[bool, FLAG] = False
    rank: Annotated[int, Whole(1)] = 16
    alpha: Annotated[float | None, Real(0, above=True)] = None
    dropout: Annotated[float, Real(0, 1, below=True)] = 0.0
    targets: Annotated[tuple[str, ...] | str, Texts((tuple, str), "a name or a list of names")] = "all-linear"
    freeze: Annotated[tuple[str, ...], Texts(tuple, "a list of names")] = ()
    epochs: Annotated[int, Whole(1)] = 1
    max_steps: Annotated[int | None, Whole(1)] = None
    batch_size: Annotated[int, Whole(1)] = 8
    accumulate: Annotated[int, Whole(1)] = 1
    lr: Annotated[float | None, Real(0, 10, above=True)] = None
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "linear"
    warmup: Annotated[float, Real(0, 1, below=True)] = 0.03
    weight_decay: Annotated[float, Real(0)] = 0.0
    clip: Annotated[float, Real(0)] = 1.0
    neftune: Annotated[float, Real(0)] = 0.0
    ema: Annotated[float, Real(0, 1, below=True)] = 0.0
    checkpointing: Annotated[bool, FLAG] = False
    loss_chunk: Annotated[int, Whole(1)] = 256
    dtype: Annotated[str, OneOf("auto", "float32", "bfloat16", "float16")] = "auto"
    device: Annotated[str, TEXT] = "auto"
    attention: Annotated[str | None, OneOf("eager", "sdpa", "flex_attention", "flash_attention_2")] = None
    seed: Annotated[int, Whole(0, 2**63 - 1)] = 0
    save_steps: Annotated[int, Whole(1)] = 50
    eval_steps: Annotated[int, Whole(1)] = 50
    log_steps: Annotated[int, Whole(1)] = 10
    judge_rows: Annotated[int, Whole(0)] = 200
    backend: Annotated[str, OneOf("pytorch", "flax")] = "pytorch"
    devices: Annotated[int, Whole(1)] = 1
    track: Annotated[tuple[str, ...], Names(*TRACKERS)] = ()

    def __post_init__(self) -> None:
        check_fields(self, InputError)
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        self._refuse({n for n in plain if getattr(self, n) != plain[n]})
        if self.backend == "flax":
            for name, value in (("method", "dora"), ("loss", "dpo"), ("loss", "orpo")):
                if getattr(self, name) == value:
                    raise InputError(f"{name} is {value!r}, which --backend flax has not: leave one of them out.")
            if self.method == "full" and self.dtype not in ("auto", "float32"):
                raise InputError(f"dtype is {self.dtype!r}: --backend flax trains all weights in float32.")
        if self.devices > 1 and self.loss != "sft":
            raise InputError(f"devices={self.devices} is of the loss sft: --loss {self.loss} runs in one process.")
        if self.method == "full" and self.dtype == "float16":
            raise InputError(
                "float16 holds no number over 65,504 nor steps as small as an optimizer's: train --full in "
                "--dtype float32 or bfloat16."
            )

    def _unread(self) -> dict[str, str]:
        """The settings that this run does not read, and what it is that does not."""
        return {name: what for names, reads, what in OWN if not reads(self) for name in names}

    def _refuse(self, given: Collection[str]) -> None:
        """Raises InputError if one of these is not read."""
        for name, what in self._unread().items():
            if name in given:
                raise InputError(f"{name}={getattr(self, name)!r} has no use with {what}: leave it out.")

    @property
    def rate(self) -> float:
        return self.lr if self.lr is not None else 1e-5 if self.method == "full" else 2e-4

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON and TOML have it; what this run does not read is left out."""
        unread = self._unread()
        return {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(self))).items() if k not in unread}

    @classmethod
    def check_names(cls, values: Collection[str], where: str) -> None:
        """Raises InputError for a name that no setting has, naming those there are."""
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise InputError(f"{where} has no setting {', '.join(unknown)}; there are {', '.join(sorted(names))}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> TuneSettings:
        """Raises InputError for a key that there is not, naming those there are, for what is missing, and for a key
        that this run does not read, even where its value is the usual one.
        """
        cls.check_names(values, where)
        missing = [name for name in ("model", "data", "out") if not values.get(name)]
        if missing:
            raise InputError(f"{where} lacks {', '.join(missing)}.")
        settled: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        made = cls(**settled)
        made._refuse(values.keys())
        return made


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a tune.toml; dashes and underscores are the same. Raises InputError."""
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        values = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"--config {path} is not valid TOML: {error}.") from None
    return {key.replace("-", "_"): value for key, value in values.items()}
