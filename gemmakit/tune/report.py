"""What a run tells: metrics as JSON lines, a card in Markdown, the curve as a picture and in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gemmakit.errors import CheckpointError
from gemmakit.files import replacing, write_text
from gemmakit.tune import devices
from gemmakit.tune.trackers import Trackers

METRICS, CARD, PLOT = "metrics.jsonl", "README.md", "loss.png"
_BARS = "▁▂▃▄▅▆▇█"

Record = dict[str, Any]


class Metrics:
    """The records of a run in its folder, a line each, as they come; those after step `keep` are of a run that died.

    trackers: are told of each too.
    """

    def __init__(self, folder: Path, keep: int | None = None, trackers: Trackers | None = None):
        self.trackers, self.path = trackers, folder / METRICS
        self.records = [] if keep is None else [r for r in read_metrics(folder) if r["step"] <= keep]
        self.records = devices.of_first(self.records)
        self._file: IO[str] | None = None
        if devices.is_first():
            write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records))
            self._file = self.path.open("a", encoding="utf-8")

    def put(self, **record: Any) -> None:
        self.records.append(record)
        if self._file is not None:
            self._write(self._file, json.dumps(record) + "\n")
        if self.trackers is not None:
            self.trackers.put(record)

    def _write(self, file: IO[str], line: str) -> None:
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written: {error.strerror}. Free some space: the run goes on from where it was "
                "last saved."
            ) from None

    def has(self, step: int, name: str) -> bool:
        return any(r["step"] == step and name in r for r in self.records)

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written was told of
                self._file.close()


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run, without a last line that was not written to its end."""
    found: list[Record] = []
    if (folder / METRICS).is_file():
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def curve(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    chosen = [r for r in records if name in r and not r.get("skipped")]
    return [r["step"] for r in chosen], [r[name] for r in chosen]


def in_terminal(values: Sequence[float], width: int = 60) -> str:
    """A line of bars, each the mean of a part of the values."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return f"{means[0]:.3f} {''.join(_BARS[round((m - low) * scale)] for m in means)} {means[-1]:.3f}"


def plot(folder: Path, records: Sequence[Record]) -> bool:
    """loss.png; whether matplotlib is there to draw it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", dict(lw=1)), ("valid_loss", dict(marker="o", lw=1.5))):
        steps, values = curve(records, name)
        if steps:
            axes.plot(steps, values, label=name.replace("_", " "), **style)  # type: ignore[arg-type]
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(folder / PLOT) as staged:
        figure.savefig(staged, format="png", dpi=120)
    return True


def card(folder: Path, kept: Mapping[str, Any], records: Sequence[Record], plotted: bool) -> None:
    """README.md: what was trained on what, how, and what came of it."""
    settings, (steps, losses) = kept["settings"], curve(records, "loss")
    name = "adapter" if settings["method"] != "full" else "model"
    lines = [
        "---", "library_name: gemmakit", f"base_model: {settings['model']}", "---", "",
        f"# An {name}" if name == "adapter" else f"# A {name}", "",
        f"Made by `gemmakit tune` from `{settings['model']}` with `{settings['data']}`.", "",
        "| | before | after |", "|---|---|---|",
        *_judged(records, losses), "",
        f"{len(steps)} steps, {sum(r.get('tokens', 0) for r in records):,} tokens with padding, "
        f"{sum(r.get('seconds', 0.0) for r in records):.1f} s in training; for a gradient that was no number "
        f"{sum(r.get('skipped', False) for r in records)} steps were skipped.", "",
        *([f"![loss]({PLOT})", ""] if plotted else []),
        "## Settings", "", "| setting | value |", "|---|---|",
        *(f"| {key} | {json.dumps(value)} |" for key, value in settings.items()), "",
        "## Data", "", "| file | rows | SHA-256 |", "|---|---|---|",
        *(f"| {split} | {told['rows']} | {told['digest']} |" for split, told in kept["data"].items()), "",
        f"Weights that it was made from, sampled: SHA-256 {kept['model']}. gemmakit {kept['version']}, "
        f"torch {kept['torch']}.",
        "",
    ]  # fmt: skip
    write_text(folder / CARD, "\n".join(lines))


def _judged(records: Sequence[Record], losses: Sequence[float]) -> list[str]:
    rows = [f"| loss of the first and the last step | {losses[0]:.4f} | {losses[-1]:.4f} |"] if losses else []
    for name, told, form in (
        ("valid_loss", "held-out loss", ".4f"),
        ("accuracy", "held-out answers that are right", ".1%"),
    ):
        _, values = curve(records, name)
        if values:
            rows.append(f"| {told} | {values[0]:{form}} | {values[-1]:{form}} |")
    return rows
