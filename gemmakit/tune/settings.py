"""What is asked of a run: the keys of tune.toml, the flags of the command, and what is written beside the result."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from gemmakit.checks import FLAG, TEXT, OneOf, Real, Whole, check_fields
from gemmakit.errors import InputError

METHODS = ("lora", "dora", "full")
LOSSES = ("sft", "dpo", "orpo")
SCHEDULES = ("constant", "linear", "cosine")
# Where a run may differ from the one it goes on from: what decides neither what is computed nor in which order.
FREE = {"out", "save_steps", "eval_steps", "log_steps", "device"}


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

    Raises InputError for values out of range, and for settings that exclude each other.
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
    columns: dict[str, str] = field(default_factory=dict)
    max_length: Annotated[int | None, Whole(2)] = None
    truncate: Annotated[bool, FLAG] = False
    packing: Annotated[bool, FLAG] = False
    rank: Annotated[int, Whole(1)] = 16
    alpha: Annotated[float | None, Real(0, above=True)] = None
    dropout: Annotated[float, Real(0, 1, below=True)] = 0.0
    targets: tuple[str, ...] | str = "all-linear"
    freeze: tuple[str, ...] = ()
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
    loss_chunk: Annotated[int, Whole(1)] = 1024
    dtype: Annotated[str, OneOf("auto", "float32", "bfloat16", "float16")] = "auto"
    device: Annotated[str, TEXT] = "auto"
    attention: Annotated[str | None, OneOf("eager", "sdpa", "flex_attention", "flash_attention_2")] = None
    seed: Annotated[int, Whole(0, 2**63 - 1)] = 0
    save_steps: Annotated[int, Whole(1)] = 50
    eval_steps: Annotated[int, Whole(1)] = 50
    log_steps: Annotated[int, Whole(1)] = 10
    judge_rows: Annotated[int, Whole(0)] = 200

    def __post_init__(self) -> None:
        check_fields(self, InputError)
        if self.method == "full":
            self._refuse("full training", quantization=self.quantization, dropout=self.dropout, alpha=self.alpha)
            if self.dtype == "float16":
                raise InputError(
                    "float16 holds no number over 65,504 nor steps as small as an optimizer's: train --full in "
                    "--dtype float32 or bfloat16."
                )
        else:
            self._refuse(f"--method {self.method}, which trains adapters alone", freeze=self.freeze)
        if self.loss != "sft":
            self._refuse(f"--loss {self.loss}, whose rows are pairs", packing=self.packing)
            if self.train_on == "all":
                raise InputError(f"--train-on all is of --loss sft: {self.loss} compares answers.")

    def _refuse(self, what: str, **values: Any) -> None:
        given = ", ".join(f"{name}={value!r}" for name, value in values.items() if value)
        if given:
            raise InputError(f"{given} has no use with {what}: leave it out.")

    @property
    def rate(self) -> float:
        return self.lr if self.lr is not None else 1e-5 if self.method == "full" else 2e-4

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON and TOML have it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> TuneSettings:
        """Raises InputError for a key that there is not, naming those there are, and for what is missing."""
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - names)
        if unknown:
            raise InputError(f"{where} has no setting {', '.join(unknown)}; there are {', '.join(sorted(names))}.")
        missing = [name for name in ("model", "data", "out") if not values.get(name)]
        if missing:
            raise InputError(f"{where} lacks {', '.join(missing)}.")
        settled: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**settled)


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
