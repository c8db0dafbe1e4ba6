"""One model, measured: against the machine's limits, and against peers that do the same work in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmakit.bench.facts import machine
from gemmakit.bench.rounds import Found, Rounds, Side, SideFailed, interleave, run_command
from gemmakit.errors import InputError
from gemmakit.files import write_text

LIMITS = ("limits", "limits again")  # measured before and behind gemmakit, in every round
WHAT = (
    "load, first token, prefill and greedy decoding of one prompt, choosing tokens included; each side a fresh process"
)


@dataclass
class Comparison:
    """What to measure, and where to say and keep what comes of it.

    Args:
        model: a folder or a name on the Hub. name: what to call it. random: its weights are random.
        config: instead of a model: fields of a configuration, for random weights made in gemmakit's process.
        quantize: a short name, for gemmakit's side.
        peers: sides besides gemmakit's, see `transformers_side` and `llamacpp_side`.
        contexts: tokens in the cache before decoding is timed; 0 is right behind the prompt.
        repeats: timed runs in a process; rounds: processes a side.
        more: fields of the spec of gemmakit's own processes (limit_s, tokens of the quality text).
    """

    model: str
    name: str
    threads: int
    device: str = "cpu"
    dtype: str = "auto"
    quantize: str | None = None
    random: bool = False
    config: dict[str, Any] | None = None
    prompt: int = 64
    new: int = 16
    contexts: Sequence[int] = (0,)
    repeats: int = 3
    rounds: int = 3
    peers: Sequence[Side] = ()
    more: dict[str, Any] | None = None
    save: Path | None = None
    say: Callable[[str], None] = lambda _: None
    run_command: Callable[[Sequence[str]], Found] = run_command

    def __post_init__(self) -> None:
        sizes = {"--prompt": self.prompt, "--new": self.new, "--rounds": self.rounds, "--repeats": self.repeats}
        for option, value in {**sizes, "--threads": self.threads}.items():
            if value < 1:
                raise InputError(f"{option} is {value}; it must be at least 1.")
        if not self.contexts or min(self.contexts) < 0:
            raise InputError(f"--context is {list(self.contexts)}; give token counts of at least 0, as in 0,4096.")

    @property
    def label(self) -> str:
        return f"gemmakit {self.quantize or short(self.dtype)}".strip()

    @property
    def spec(self) -> dict[str, Any]:
        """What every side is told."""
        source = {"model": self.model} if self.config is None else {"config": self.config}
        return {
            **source, "dtype": self.dtype, "device": self.device, "threads": self.threads,
            "prompt": self.prompt, "new": self.new, "contexts": list(self.contexts), "repeats": self.repeats,
            "fill": "random" if self.device == "cpu" else "prompt", "stream": self.device == "cpu",
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Measure, saving after each process; what the JSON holds. Ctrl-C gives what there is, `interrupted` true."""
        extra = self.more or {}
        limits = {"part": "limits", "device": self.device, "threads": self.threads, **extra}
        sides = [
            Side(LIMITS[0], "ours", limits),
            Side(self.label, "ours", {**self.spec, "quantize": self.quantize}),
            Side(LIMITS[1], "ours", limits),
            *self.peers,
        ]

        schemes = dict.fromkeys(str(q) for side in sides if (q := side.spec.get("quantize")))
        quality: dict[str, Found] = {}

        def keep(rounds: Rounds) -> None:
            if self.save is not None:
                write_text(self.save, json.dumps(self.result(rounds, quality), indent=1) + "\n")

        try:
            for scheme in schemes:
                quality[scheme] = self._quality(scheme, extra)
        except KeyboardInterrupt:
            return self.result(Rounds(interrupted=True), quality)
        done = interleave(sides, self.rounds, say=self.say, keep=keep, run=self.run_command)
        return self.result(done, quality)

    def _quality(self, scheme: str, extra: dict[str, Any]) -> Found:
        """What went wrong where it cannot be measured, so that the speed is not quoted alone."""
        self.say(f"the quality of {scheme}, on the demo model")
        spec = {"part": "quality", "quantize": scheme, "threads": self.threads, **extra}
        try:
            return self.run_command(Side("quality", "ours", spec).command)
        except SideFailed as error:
            return {"error": str(error)}

    def result(self, done: Rounds, quality: dict[str, Found]) -> dict[str, Any]:
        limits = best_limits(done)
        sides = {label: done.medians(label) for label in done.labels() if label not in LIMITS}
        peers = [label for label in sides if label != self.label]
        return {
            "what": WHAT,
            **machine(self.threads),
            "model": {"name": self.name, "random_weights": self.random},
            "settings": {k: v for k, v in self.spec.items() if k not in ("model", "config")}
            | {"quantize": self.quantize},
            "ours": self.label,
            "limits": limits,
            "sides": sides,
            "shares": shares(sides.get(self.label), limits),
            "ratios": {label: done.ratios(self.label, label) for label in peers if self.label in sides},
            "quality": quality,
            "failed": done.failed,
            "interrupted": done.interrupted,
            "rounds": done.rounds,
        }


def best_limits(done: Rounds) -> Found:
    """The best that was seen of each limit: what the machine can do, not what its neighbours left of it."""
    found = [r[label] for r in done.rounds for label in LIMITS if label in r]
    if not found:
        return {}
    best = max(found, key=lambda f: f["bandwidth_gb_per_s"])
    rates = {d: max(f["matmul_gflop_per_s"][d] for f in found) for d in best["matmul_gflop_per_s"]}
    return {**best, "matmul_gflop_per_s": rates}


def shares(side: Found | None, limits: Found) -> dict[str, Any]:
    """Of the bandwidth, decoding after each context; of the matmul rate (the faster dtype's), prefill. 0 to 1."""
    if side is None or not limits:
        return {}
    bandwidth, rates = limits["bandwidth_gb_per_s"] * 1e9, limits["matmul_gflop_per_s"]
    fastest = max(rates, key=lambda dtype: rates[dtype])
    decode = {
        context: read * side[decode_key(int(context))] / bandwidth
        for context, read in side.get("bytes_a_token", {}).items()
    }
    prefill = side["prefill_flops_a_token"] * side["prefill_tokens_per_s"] / (rates[fastest] * 1e9)
    decode = {context: round(share, 4) for context, share in decode.items()}
    return {"decode_of_bandwidth": decode, "prefill_of_matmul": round(prefill, 4), "matmul_dtype": fastest}


def decode_key(context: int) -> str:
    """As sides/common.py names it."""
    return "decode_tokens_per_s" if context == 0 else f"decode_tokens_per_s_after_{context}"


def short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": ""}.get(dtype, dtype)


def transformers_side(spec: dict[str, Any], dtype: str, **changes: Any) -> Side:
    """transformers on the same folder, in its dtype ("auto" there as here)."""
    return Side(f"transformers {short(dtype)}".strip(), "transformers_side", {**spec, "dtype": dtype, **changes})


def llamacpp_side(spec: dict[str, Any], file: str | Path, python: str, **changes: Any) -> Side:
    """llama.cpp on a GGUF file, named by it, run by an interpreter that has llama-cpp-python."""
    path = Path(file)
    return Side(f"llama.cpp {path.stem}", "llamacpp", {**spec, "model": str(path.absolute()), **changes}, python)
