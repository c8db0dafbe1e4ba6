"""Results as tables: what was reached, of what is possible, and beside what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gemmakit.bench.timing import decode_key
from gemmakit.cli.bench import NOTHING, aligned, bytes_note, limit_notes, quality_note

# Published dense bfloat16 rates, operations a second. Source: NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "L4": 121e12, "L40S": 362e12}


@dataclass(frozen=True)
class Table:
    """A title, headings and rows of texts; lines to read below it."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str]


def plain_lines(table: Table) -> Iterator[str]:
    """The table as aligned text, numbers to the right."""
    yield table.title
    yield from aligned([table.headings, *table.rows])
    yield from table.notes


def plain_notes(table: Table) -> list[str]:
    """The notes as a list in Markdown."""
    return [f"- {note}" for note in table.notes]


# -- a comparison ------------------------------------------------------------------------------------------------------


def comparison_table(result: dict[str, Any]) -> Table:
    sides: dict[str, Any] = result["sides"]
    rows = [[name, *(text(side) for side in sides.values()), *limit] for name, text, limit in _measures(result)]
    model, settings = result["model"], result["settings"]
    random = ", random weights" if model["random_weights"] else ""
    title = (
        f"{model['name']}{random}: prompt {settings['prompt']}, new {settings['new']}, "
        f"{_count(result['threads'], 'thread')}, {_count(len(result['rounds']), 'round')}"
    )
    return Table(title, ["", *sides, "of the limit"], rows, list(_notes(result)))


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _measures(result: dict[str, Any]) -> Iterator[tuple[str, Any, list[str]]]:
    """(name, side -> text, what share of the limit it is)."""
    shares = result["shares"]
    for name, key, unit in (("load", "load_s", "s"), ("start to first token", "first_token_s", "s")):
        yield name, _cell(key, unit), [NOTHING]
    yield (
        f"prefill, {result['settings']['prompt']} tokens",
        _cell("prefill_tokens_per_s", "tok/s"),
        [f"{_percent(shares.get('prefill_of_matmul'))} matmul"],
    )
    for context in result["settings"]["contexts"]:
        name = "decode" if context == 0 else f"decode after {context:,} tokens"
        share = shares.get("decode_of_bandwidth", {}).get(str(context))
        yield name, _cell(decode_key(context), "tok/s"), [f"{_percent(share)} bandwidth"]
    yield "memory, anonymous", _cell("anonymous_gb", "GB"), [NOTHING]
    yield "memory, peak", _cell("peak_rss_gb", "GB"), [NOTHING]


def _cell(key: str, unit: str) -> Any:
    return lambda side: f"{side[key]:.3g} {unit}" if key in side else NOTHING


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


def _notes(result: dict[str, Any]) -> Iterator[str]:
    ours = result["sides"].get(result["ours"])
    if ours is not None:
        yield bytes_note(ours)
    yield from limit_notes(result["limits"], result["shares"])
    for label, side in result["sides"].items():
        for context in result["settings"]["contexts"][1:]:
            after = side.get(f"decode_after_{context}_over_first")
            if after is not None:
                yield f"{label} after {context:,} tokens: {after - 1:+.1%}, median of the repeats' ratios."
    for label, ratios in result["ratios"].items():
        rates = (
            (k, ratios[k]) for k in ("decode_tokens_per_s", "prefill_tokens_per_s", "first_token_s") if k in ratios
        )
        said = ", ".join(f"{k.removesuffix('_tokens_per_s').removesuffix('_s')} {v:.2f}x" for k, v in rates)
        yield f"{result['ours']} / {label}, median of the rounds' ratios: {said}."
    for scheme, quality in result["quality"].items():
        yield quality_note(scheme, quality)
    for label, why in result["failed"].items():
        yield f"{label} failed: {why}"
    if result["interrupted"]:
        yield "Interrupted: this is what was measured until then."


# -- the recipe of an accelerator --------------------------------------------------------------------------------------


def recipe_table(result: dict[str, Any]) -> Table:
    limits, settings = result["limits"], result["settings"]
    rows = [_recipe_row(label, part, result) for label, part in result["parts"].items()]
    device = limits.get("device", result["machine"])
    title = f"{device}, {settings['dtype']}, torch {result['versions'].get('torch')}, {result['date']}"
    headings = ["", "tokens/s", "of the limit", f"after {settings['context']:,}", f"prefill {settings['prefill']:,}",
                "of matmul", "warm-up s", "peak GB"]  # fmt: skip
    return Table(title, headings, rows, list(_recipe_notes(result)))


def _recipe_row(label: str, part: dict[str, Any], result: dict[str, Any]) -> list[str]:
    if "error" in part:
        return [label, "failed", *[NOTHING] * 6]
    limits = result["limits"]
    value = next(
        (part[k] for k in ("decode_tokens_per_s", "batch_tokens_per_s", "train_tokens_per_s") if k in part), None
    )
    after, prefill = part.get(f"decode_after_{result['settings']['context']}_over_first"), "prefill_tokens_per_s"
    peak = part.get("peak_device_gb")
    return [
        label,
        NOTHING if value is None else f"{value:.4g}",
        _percent(limit_share(part, limits)),
        NOTHING if after is None else f"{after - 1:+.1%}",
        f"{part[prefill]:.4g}" if prefill in part else NOTHING,
        _percent(prefill_share(part, limits)),
        f"{part['warm_up_s']:.1f}" if "warm_up_s" in part else NOTHING,
        NOTHING if peak is None else f"{peak:.3g}",
    ]


def limit_share(part: dict[str, Any], limits: dict[str, Any]) -> float | None:
    """Of the bandwidth for decoding, one row or a batch; of the matmul rate for training. 0 to 1; None if unknown."""
    if "bandwidth_gb_per_s" not in limits:
        return None
    bandwidth, matmul = limits["bandwidth_gb_per_s"] * 1e9, _matmul(part, limits)
    if "train_flops_a_token" in part:
        return part["train_flops_a_token"] * part["train_tokens_per_s"] / matmul
    if "batch_bytes_a_step" in part:
        return part["batch_bytes_a_step"] * part["batch_tokens_per_s"] / part["rows"] / bandwidth
    if "bytes_a_token" in part:
        return part["bytes_a_token"]["0"] * part["decode_tokens_per_s"] / bandwidth
    return None


def prefill_share(part: dict[str, Any], limits: dict[str, Any]) -> float | None:
    if (
        "prefill_tokens_per_s" not in part
        or "prefill_flops_a_token" not in part
        or not limits.get("matmul_gflop_per_s")
    ):
        return None
    done = part["prefill_flops_a_token"] * part["prefill_tokens_per_s"]
    return done / _matmul(part, limits)


def _matmul(part: dict[str, Any], limits: dict[str, Any]) -> float:
    """Operations a second in the part's own dtype, bfloat16 where that was not measured."""
    rates = limits["matmul_gflop_per_s"]
    return rates.get(part.get("dtype"), rates["bfloat16"]) * 1e9


def _recipe_notes(result: dict[str, Any]) -> Iterator[str]:
    yield from limit_notes(result["limits"], {"matmul_dtype": result["settings"]["dtype"]})
    yield from _heads(result["parts"])
    yield from _agreements(result["parts"])
    yield from _ways(result)
    yield from _mfu(result)
    yield from _peer_ratios(result["parts"])
    for scheme, quality in result["quality"].items():
        yield quality_note(scheme, quality)
        if "device_error" in quality:
            yield f"Quality of {scheme} was measured on the CPU, for the device failed: {quality['device_error']}"
    for label, part in result["parts"].items():
        if "error" in part:
            yield f"{label}: {part['error']}"
    if result["peer"]:
        yield f"No peer: {result['peer']}."
    if result["interrupted"]:
        yield "Interrupted: this is what was measured until then."


def _heads(parts: dict[str, Any]) -> Iterator[str]:
    for label, part in parts.items():
        if label.endswith("generate") and "head_dtype" in part:
            read, head = part["bytes_a_token"]["0"] / 1e9, part["head_bytes"] / 1e9
            yield f"{label}: {read:.3g} GB a token, {head:.3g} of them the head in {part['head_dtype']}."


def _agreements(parts: dict[str, Any]) -> Iterator[str]:
    """Whether the fast path chooses what plain torch chooses."""
    for label, part in parts.items():
        found = part.get("agreement")
        if found is None:
            continue
        if "error" in found:
            yield f"{label}: NOT compared with plain torch: {found['error']}"
            continue
        end = ""
        if found["same"] < found["tokens"]:
            end = f", then {'a near tie' if found['near_tie'] else 'ANOTHER ONE, and no near tie'}"
            end += f" (margin {found['margin']:.2g})"
        yield (
            f"{label}: {'WRONG, ' * found['wrong']}{found['same']} of {found['tokens']} tokens as plain torch has "
            f"them{end}; logits differ by at most {found['logits_off']:.1%} of their spread; replayed steps gave the "
            f"first {found['replayed_same']} as the same kernels one by one."
        )


def _ways(result: dict[str, Any]) -> Iterator[str]:
    """What did not go the fast way on an accelerator, and what was said about it."""
    if result["settings"]["device"] == "cpu":
        return
    for label, part in result["parts"].items():
        if part.get("graphs") == 0 or part.get("replayed_passes") == 0:
            yield f"{label}: no step was replayed."
        for line in part.get("said", ()):
            if "fewer than" not in line:  # prefill alone is timed with one new token
                yield f"{label} said: {line.splitlines()[0]}"


def _mfu(result: dict[str, Any]) -> Iterator[str]:
    peak = peak_flops(result["limits"].get("device", ""))
    for label, part in result["parts"].items():
        if peak is not None and "train_flops_a_token" in part:
            share = part["train_flops_a_token"] * part["train_tokens_per_s"] / peak
            yield f"{label}: {share:.1%} of the data sheet's {peak / 1e12:.0f} TFLOP/s (MFU)."


def _peer_ratios(parts: dict[str, Any]) -> Iterator[str]:
    """gemmakit's rate over each peer's, and each quantization's over the plain one's."""
    starts = ("decode_tokens", "batch_tokens", "train_tokens", "prefill_tokens")
    for label, part in parts.items():
        size, _, rest = label.partition(" ")
        plain = f"{size} gemmakit {'plain generate' if 'generate' in rest else rest.split(' ', 1)[-1]}"
        ours = parts.get(plain, {})
        if label == plain or "error" in part or "error" in ours:
            continue
        a, b = (part, ours) if "gemmakit" in label else (ours, part)
        keys = [k for k in a if k.startswith(starts) and b.get(k)]
        said = [f"{k.replace('_tokens_per_s', '').replace('_', ' ')} {a[k] / b[k]:.2f}x" for k in keys]
        first, second = (label, plain) if "gemmakit" in label else (plain, label)
        if said:
            yield f"{first} / {second}: {', '.join(said)}."


def peak_flops(device: str) -> float | None:
    """The data sheet's dense bfloat16 rate; None for a device that is not in the table."""
    words = set(re.findall(r"\w+", device))
    return next((rate for name, rate in PEAKS.items() if words.issuperset(name.split())), None)
