"""Writes the tables and the picture of docs/quantization.md: python benchmarks/quality_table.py [--check]

From benchmarks/results/; the picture needs `pip install 'gemmakit[plot]'`.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end -->"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def lost(ratio: float) -> str:
    return f"{ratio - 1:+.2%}".replace("%", " %")


def table(columns: tuple[str, ...], lines: list[str], about: str) -> str:
    return "\n".join([row(*columns), f"|{'---|' * len(columns)}", *lines, "", about, ""])


# -- the demo model ----------------------------------------------------------------------------------------------------

COLUMNS = ("weights", "perplexity", "a token at a time", "divergence", "same token", "accuracy", "MB")


def line(name: str, held: dict[str, float]) -> str:
    return row(
        name,
        lost(held["ratio"]) if name != "float32" else f"{held['perplexity']:.2f}",
        lost(held["step_ratio"]) if name != "float32" else f"{held['step_perplexity']:.2f}",
        f"{1000 * held['kl']:.2f}" if "kl" in held else "",
        f"{held['same_token']:.1%}".replace("%", " %") if "same_token" in held else "",
        f"{held['accuracy']:.1%}".replace("%", " %"),
        f"{held['bytes'] / 1e6:.2f}",
    )


def demo_table(result: dict[str, Any]) -> str:
    about = result["about"]
    packages = [
        f"{name} {about[name]}" for name in ("bitsandbytes", "transformers", "llama-cpp-python") if name in about
    ]
    where = f"{about['tokens']:,} tokens ({about['tokens_stepped']:,} of them a token at a time), "
    where += f"{about['questions']} questions; torch {about['torch']}, {', '.join(packages)}"
    lines = [line(name, held) for name, held in result["rows"].items()]
    return table(COLUMNS, lines, f"{where}; `benchmarks/quantized_quality.py`.")


# -- Gemma 3 270M ------------------------------------------------------------------------------------------------------


def real_table(result: dict[str, Any]) -> str:
    """Ours, then llama.cpp's of the same numbers and of the same file."""
    about, held = result["about"], dict(result["rows"])
    said = json.loads((ROOT / "tests" / "real" / "reference.json").read_text())
    for kind, name in (("float32", "llama.cpp, float32"), ("stored", "llama.cpp, as stored")):
        if sum(said["tokens"][: len(said.get(kind, {"losses": []})["losses"])]) == about["tokens"]:
            held[name] = {"loss": sum(said[kind]["losses"]), "bytes": held[name.split(", ")[1]]["bytes"]}
    exact = held["float32"]["loss"]
    lines = [
        row(
            name,
            f"{math.exp(form['loss'] / about['tokens']):.3f}",
            "" if name == "float32" else lost(math.exp((form["loss"] - exact) / about["tokens"])),
            f"{form['bytes'] / 1e6:.0f}",
        )
        for name, form in held.items()
    ]
    where = f"{about['tokens']:,} tokens in windows of {about['window']}; {about['processor']}, torch {about['torch']}"
    return table(("weights", "perplexity", "against float32", "MB"), lines, f"{where}; `benchmarks/real_quality.py`.")


# -- loss over bytes ---------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    name: str
    size: float  # MB
    lost: float  # nats a token above float32
    whose: str


def whose(form: str) -> str:
    if form.startswith("int") or " bits" in form:
        return "ours"
    return "OpenVINO" if form.startswith("OpenVINO") else "llama.cpp"


def curve(result: dict[str, Any]) -> list[Point]:
    """The smallest first."""
    rows, tokens = result["rows"], result["about"]["tokens"]
    exact = sum(rows["float32"]["losses"])
    points = [
        Point(name, held["bytes"] / 1e6, (sum(held["losses"]) - exact) / tokens, whose(name))
        for name, held in rows.items()
        if name != "float32"
    ]
    return sorted(points, key=lambda point: point.size)


def curve_table(result: dict[str, Any]) -> str:
    about = result["about"]
    lines = [
        row(
            f"llama.cpp {point.name}" if point.whose == "llama.cpp" else point.name,
            f"{point.size:.1f}",
            f"{point.lost:+.3f}",
            f"{math.expm1(point.lost):+.1%}".replace("%", " %"),
        )
        for point in curve(result)
    ]
    where = (
        f"{about['tokens']:,} tokens in windows of {about['window']}, {about['calibration']:,} tokens of calibration"
    )
    where += f"; {about['processor']}, torch {about['torch']}; `benchmarks/real_curve.py`."
    return table(("weights", "MB", "loss, nats a token", "perplexity"), lines, where)


def draw(result: dict[str, Any], path: Path) -> None:
    """The same as a picture."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 9}
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    kinds = (("ours, calibrated", "#1f6fb4", "o"), ("ours, self-calibrated", "#3f9a6d", "^"), ("ours", "#8cbbe0", "o"),
             ("llama.cpp", "#c96a1b", "s"), ("OpenVINO", "#8a5fb0", "D"))  # fmt: skip
    for kind, colour, mark in kinds:
        points = [p for p in curve(result) if _kind(p) == kind]
        if not points:
            continue
        axes.plot([p.size for p in points], [max(p.lost, FLOOR) for p in points], mark, color=colour, label=kind)
        for point in points:
            short = point.name.removeprefix("OpenVINO ").split(", ")[0]
            at = point.size, max(point.lost, FLOOR)
            axes.annotate(short, at, (4, 3), textcoords="offset points", fontsize=7, color=colour)
    axes.margins(x=0.1)  # for the last names
    axes.set_yscale("log")
    axes.set_xlabel("MB of weights in the file")
    axes.set_ylabel("loss above float32, nats a token")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


FLOOR = 1e-3  # nats; below it a loss is one of the text's own noise


def _kind(point: Point) -> str:
    """Whose it is, and on what it was calibrated."""
    return point.whose + "".join(point.name.partition(", ")[1:])


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "<!-- real quality table: made by benchmarks/quality_table.py -->\n": ("real_quality", real_table),
    "<!-- real curve table: made by benchmarks/quality_table.py -->\n": ("real_curve", curve_table),
    "<!-- quality table: made by benchmarks/quality_table.py -->\n": ("quantized_quality", demo_table),
}


def filled(text: str) -> str:
    """The page with its tables as the results have them."""
    for begin, (name, made) in TABLES.items():
        before, rest = text.split(begin)
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        text = before + begin + made(result) + END + rest.split(END, 1)[1]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    check = parser.parse_args().check
    page = ROOT / "docs" / "quantization.md"
    text = page.read_text(encoding="utf-8")
    new = filled(text)
    if not check:
        page.write_text(new, encoding="utf-8")
        result = json.loads((ROOT / "benchmarks" / "results" / "real_curve.json").read_text())
        draw(result, ROOT / "docs" / "quantization_curve.svg")
    return int(check and new != text)


if __name__ == "__main__":
    sys.exit(main())
