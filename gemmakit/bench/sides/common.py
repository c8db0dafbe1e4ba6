"""What all sides share: the same prompt, the same way to time, the same counts. Only the standard library.

A side is called with one argument, a JSON object (the spec), and its last line of output is a JSON object. Fields of a
spec: threads, prompt and new (tokens), contexts (tokens that are in the cache before decoding is timed; 0: the prompt),
repeats, fill (how a context gets there: "prompt", or "random" keys and values), stream (time tokens as they come, or
runs of two lengths).
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# New tokens of the shorter run, where decoding is timed as a difference. Enough for both runs to go the same way: fewer
# would not be worth a graph to gemmakit, and the difference would leave out what its slower steps take.
FEW = 16


def prompt_ids(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """<bos> and random ids, the same on every side."""
    rng = random.Random(seed)
    return [2, *(rng.randrange(5, vocabulary) for _ in range(count - 1))]


class Arrivals:
    """A streamer that notes when the prompt and each token came, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


# run(context, new tokens, streamer or None): generate greedily, return when the tokens are there.
Run = Callable[[int, int, Any], object]


def streamed(run: Run, context: int, new: int) -> tuple[float, float]:
    """(seconds until the first token, seconds from it until `new` more are there): each includes choosing tokens."""
    arrivals, started = Arrivals(), time.perf_counter()
    run(context, new + 1, arrivals)
    first = arrivals.times[-new - 1]
    return first - started, arrivals.times[-1] - first


def by_difference(run: Run, context: int, new: int) -> tuple[float, float]:
    """The same for an accelerator, where reading each token would hold it up: runs of two lengths, subtracted."""
    return seconds(lambda: run(context, 1, None)), seconds(lambda: run(context, FEW + new, None)) - seconds(
        lambda: run(context, FEW, None)
    )


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rates(run: Run, spec: dict[str, Any]) -> dict[str, float]:
    """Prefill and decode rates, tokens/s: medians over `repeats`, the contexts in turn.

    `decode_after_C_over_first` is the median of each repeat's ratio; warm_up_s is the time before, in which whatever
    compiles or captures does so. Prefill is of the prompt, or of spec["prefill"] tokens, which then have to be read as
    a prompt (`fill`).
    """
    new, contexts, read = spec["new"], spec["contexts"], spec.get("prefill")
    stream = spec.get("stream", True)
    measure = streamed if stream else by_difference
    started = time.perf_counter()
    for context in contexts:  # all lengths where graphs are captured or compiled for each
        measure(run, context, min(new, 2) if stream else new)
    first: list[float] = []
    rest: dict[int, list[float]] = {context: [] for context in contexts}
    if read:
        run(read, 1, None)
    warm_up = time.perf_counter() - started
    for _ in range(spec["repeats"]):
        for context in contexts:
            until, after = measure(run, context, new)
            rest[context].append(above_zero(after))
            if context == contexts[0] and not read:
                first.append(until)
        if read:
            first.append(seconds(lambda: run(read, 1, None)))
    out = {"warm_up_s": warm_up}
    out["prefill_tokens_per_s"] = (read or contexts[0] or spec["prompt"]) / statistics.median(first)
    for context, times in rest.items():
        out[decode_key(context)] = new / statistics.median(times)
        if context != contexts[0]:
            pairs = zip(rest[contexts[0]], times, strict=True)
            out[f"decode_after_{context}_over_first"] = statistics.median(a / b for a, b in pairs)
    return out


def above_zero(took: float) -> float:
    """The seconds, or an error where the noise was larger than what is measured."""
    if took <= 0:
        sys.exit(
            "the longer run took no longer than the shorter one: the work is too small to time, ask for more tokens"
        )
    return took


def filled(torch: Any, model: Any, cache: Any, context: int) -> Any:
    """The cache with random keys and values for `context` tokens: as fast as real ones, and there at once."""
    c = model.config
    for layer in range(c.num_hidden_layers):
        shape = (1, c.num_key_value_heads, context, c.head_dim)
        k, v = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in "kv")
        cache.update(k, v, layer)
    return cache


def decode_key(context: int) -> str:
    return "decode_tokens_per_s" if context == 0 else f"decode_tokens_per_s_after_{context}"


def anonymous_bytes() -> int | None:
    """Memory of this process that no file backs; None where the system does not say (it is Linux that does)."""
    return _status_bytes("RssAnon")


def peak_bytes() -> int | None:
    """The most memory this process had, mapped pages of files included; None where the system does not say."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def memory(bare: int | None) -> dict[str, float]:
    """anonymous_gb beyond `bare` (what the imports took) and peak_rss_gb; nothing where the system does not say."""
    now, peak = anonymous_bytes(), peak_bytes()
    out: dict[str, float] = {}
    if now is not None and bare is not None:
        out["anonymous_gb"] = (now - bare) / 1e9
    if peak is not None:
        out["peak_rss_gb"] = peak / 1e9
    return out


class Said:
    """The lines that a package logs, and warnings: why something went another way than it might have."""

    def __init__(self, package: str):
        self.lines: dict[str, None] = {}
        handler = logging.Handler()
        handler.emit = self._emit
        logging.captureWarnings(True)
        for name in (package, "py.warnings"):
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(logging.DEBUG)

    def _emit(self, record: logging.LogRecord) -> None:
        self.lines.setdefault(record.getMessage().strip()[:500])


def tidy(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers to five digits, for reading."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}


def main(parts: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Run the part that the spec names and print what it gives."""
    spec = json.loads(sys.argv[1])
    print(json.dumps(tidy(parts[spec.get("part", "generate")](spec))), flush=True)
