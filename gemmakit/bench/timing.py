"""The same prompt, the same way to time, the same counts for every program that is measured. Only the standard library:
other programs are timed by this too, in interpreters of their own.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gemmakit.errors import InputError

# New tokens of the shorter run, where decoding is timed as a difference. Enough for both runs to go the same way: fewer
# would not be worth a graph to gemmakit, and the difference would leave out what its slower steps take.
FEW = 16


@dataclass(frozen=True)
class Work:
    """What is timed: greedy decoding of `new` tokens after a prompt, and the reading of a prompt.

    Args:
        prompt: tokens of the prompt.
        contexts: tokens in the cache before decoding is timed; 0 is right behind the prompt.
        prefill: tokens of the prompt whose reading is timed; None for those of `prompt`.
        repeats: timed runs; the median counts.
        fill: how a context gets there: read as a "prompt", or "random" keys and values, as fast to read and there at
            once.
        stream: time tokens as they come, or (an accelerator would be held up by looking) runs of two lengths.
        in_turn: say what each timed run gave, and do the next when a line comes on standard input: see `turn`.

    Raises:
        InputError: a number that measures nothing.
    """

    prompt: int = 64
    new: int = 16
    contexts: tuple[int, ...] = (0,)
    prefill: int | None = None
    repeats: int = 3
    fill: str = "random"
    stream: bool = True
    in_turn: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt", "new", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.contexts or min(self.contexts) < 0:
            raise InputError(f"contexts are {[*self.contexts]}; give token counts of at least 0, as in 0,4096.")

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Work:
        """From a JSON object that may hold other things too."""
        given = {field.name: spec[field.name] for field in fields(cls) if field.name in spec}
        given["contexts"] = tuple(spec.get("contexts", (0,)))
        return cls(**given)


def prompt_ids(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """<bos> and random ids, the same for every program."""
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
    """The same as a difference of runs of two lengths."""
    first, long, short = (seconds(lambda n=n: run(context, n, None)) for n in (1, FEW + new, FEW))
    return first, long - short


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rates(run: Run, work: Work) -> dict[str, float]:
    """Prefill and decode rates, tokens/s: medians over the repeats, the contexts in turn.

    `decode_after_C_over_first` is the median of each repeat's ratio; warm_up_s is the time before, in which whatever
    compiles or captures does so.
    """
    new, contexts, read = work.new, work.contexts, work.prefill
    measure = streamed if work.stream else by_difference
    started = time.perf_counter()
    for context in contexts:  # all lengths where graphs are captured or compiled for each
        measure(run, context, min(new, 2) if work.stream else new)
    if read:
        run(read, 1, None)
    out = {"warm_up_s": time.perf_counter() - started}

    def timed() -> dict[str, float]:
        taken = {context: measure(run, context, new) for context in contexts}
        first, rest = taken[contexts[0]][0], {context: above_zero(after) for context, (_, after) in taken.items()}
        first = seconds(lambda length=read: run(length, 1, None)) if read else first
        found = {"prefill_tokens_per_s": (read or contexts[0] or work.prompt) / first}
        for context, after in rest.items():
            found[decode_key(context)] = new / after
            if context != contexts[0]:
                found[f"decode_after_{context}_over_first"] = rest[contexts[0]] / after
        return found

    each: list[dict[str, float]] = []
    for _ in range(work.repeats):
        if work.in_turn:
            turn(each[-1] if each else {})
        each.append(timed())
    if work.in_turn:
        turn(each[-1])
    return out | {key: statistics.median(found[key] for found in each) for key in each[0]}


TURN = "turn "


def turn(found: dict[str, float]) -> None:
    """Say on standard output what the last timed run gave, if there was one, and wait for a line."""
    print(TURN + json.dumps(found), flush=True)
    sys.stdin.readline()


def decode_key(context: int) -> str:
    return "decode_tokens_per_s" if context == 0 else f"decode_tokens_per_s_after_{context}"


def above_zero(took_s: float) -> float:
    """The seconds. Raises InputError where the noise was larger than what is measured."""
    if took_s <= 0:
        raise InputError(
            "the longer run took no longer than the shorter one: the work is too small to time, ask for more tokens."
        )
    return took_s


def filled(torch: Any, model: Any, cache: Any, context: int) -> Any:
    """The cache with random keys and values for `context` tokens."""
    config = model.config
    # Of a peer's configuration: one whose layers are alike.
    layers = config.kv_layers() if hasattr(config, "kv_layers") else [config] * config.num_hidden_layers
    for layer, spec in enumerate(layers):
        shape = (1, spec.num_key_value_heads, context, spec.head_dim)
        k, v = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in "kv")
        cache.update(k, v, layer)
    return cache


def anonymous_bytes() -> int | None:
    """Memory of this process that no file backs; None where the system does not say (it is Linux that does)."""
    return _status_bytes("RssAnon")


def memory(bare: int | None) -> dict[str, float]:
    """anonymous_gb beyond `bare` bytes (what the imports took), and peak_rss_gb, the most there ever was, mapped pages
    of files included; nothing where the system does not say.
    """
    now, peak = anonymous_bytes(), _status_bytes("VmHWM")
    out: dict[str, float] = {}
    if now is not None and bare is not None:
        out["anonymous_gb"] = (now - bare) / 1e9
    if peak is not None:
        out["peak_rss_gb"] = peak / 1e9
    return out


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
