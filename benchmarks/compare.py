"""One model, measured against the machine's limits and, in turn, beside transformers and llama.cpp.

    python benchmarks/compare.py [MODEL | --size 2b] --peer transformers [--quantize int8] [--json FILE]
    python benchmarks/compare.py MODEL --peer llama.cpp --gguf FILE --llama-python llama/bin/python

Each measurement is a fresh process, and the sides take turns; Ctrl-C keeps what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checkpoints import cached_random
from report import comparison_table, plain_lines
from rounds import Found, Rounds, Side, SideFailed, interleave, run_command

from gemmakit import demo_model
from gemmakit.bench.measure import scheme_config, shares
from gemmakit.bench.timing import Work
from gemmakit.cli.env import about, available_cores
from gemmakit.errors import GemmakitError, InputError, MissingDependency
from gemmakit.files import write_text

PEERS = ("transformers", "llama.cpp")
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
        for name, value in {"rounds": self.rounds, "threads": self.threads}.items():
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        Work.of(self.spec)  # refuses sizes that measure nothing

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
            Side(LIMITS[0], "gemmakit_side", limits),
            Side(self.label, "gemmakit_side", {**self.spec, "quantize": self.quantize}),
            Side(LIMITS[1], "gemmakit_side", limits),
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
            return self.run_command(Side("quality", "gemmakit_side", spec).command)
        except SideFailed as error:
            return {"error": str(error)}

    def result(self, done: Rounds, quality: dict[str, Found]) -> dict[str, Any]:
        limits = best_limits(done)
        sides = {label: done.medians(label) for label in done.labels() if label not in LIMITS}
        peers = [label for label in sides if label != self.label]
        return {
            "what": WHAT,
            **about(self.threads, "triton", "transformers"),
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


def short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": ""}.get(dtype, dtype)


def transformers_side(spec: dict[str, Any], dtype: str, **changes: Any) -> Side:
    """transformers on the same folder, in its dtype ("auto" there as here)."""
    return Side(f"transformers {short(dtype)}".strip(), "transformers_side", {**spec, "dtype": dtype, **changes})


def llamacpp_side(spec: dict[str, Any], file: str | Path, python: str, **changes: Any) -> Side:
    """llama.cpp on a GGUF file, named by it, run by an interpreter that has llama-cpp-python."""
    path = Path(file)
    return Side(f"llama.cpp {path.stem}", "llamacpp", {**spec, "model": str(path.absolute()), **changes}, python)


def refused(args: argparse.Namespace) -> None:
    """Raises InputError and MissingDependency, before anything is measured."""
    if args.model is not None and args.size is not None:
        raise InputError(f"{args.model!r} and --size {args.size} are both given: give one of them.")
    scheme_config(args.quantize)
    if "transformers" in args.peer and find_spec("transformers") is None:
        raise MissingDependency("--peer transformers needs the transformers package: pip install transformers.")
    if "llama.cpp" in args.peer and not args.gguf:
        raise InputError("--peer llama.cpp needs a model of its own: name one with --gguf FILE.")
    if "llama.cpp" in args.peer and args.device != "cpu":
        raise InputError("--peer llama.cpp is measured on the CPU only: leave --device out.")
    for file in args.gguf:
        if not file.is_file():
            raise InputError(f"--gguf {file}: there is no such file.")


def compared(args: argparse.Namespace) -> Comparison:
    """What the command line asks for."""
    refused(args)
    say = lambda message: print(message, file=sys.stderr, flush=True)  # noqa: E731
    model, name = args.model or str(demo_model()), args.model or "the demo model"
    if args.size is not None:
        model = str(cached_random(args.size, "bfloat16" if args.dtype == "auto" else args.dtype, say))
        name = f"Gemma {args.size.upper()} shape"
    quick = {"limit_s": 0.05, "limit_bytes": 1 << 22, "tokens": 512}
    comparison = Comparison(
        model=model, name=name, random=args.size is not None, device=args.device, dtype=args.dtype,
        quantize=args.quantize, prompt=args.prompt, new=args.new, contexts=args.context, threads=args.threads,
        rounds=args.rounds, repeats=args.repeats, save=args.json, say=say, more=quick if args.quick else None,
    )  # fmt: skip
    peers = [transformers_side(comparison.spec, args.dtype)] if "transformers" in args.peer else []
    if "llama.cpp" in args.peer:
        peers += [llamacpp_side(comparison.spec, file, args.llama_python) for file in args.gguf]
    comparison.peers = peers
    return comparison


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub id; if left out, the demo model")
    parser.add_argument("--size", help="random weights in the shape 2b, 7b or tiny, instead of a model")
    parser.add_argument("--peer", action="append", choices=PEERS, default=[], help="may be repeated")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="for llama.cpp; may be repeated")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", help="int8, int4, int4-g128, int4-a8, for gemmakit's side")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate in each timed run")
    parser.add_argument(
        "--context", type=lambda text: tuple(map(int, text.split(","))), default=(0,),
        help="tokens in the cache before decoding is timed, as in 0,4096",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=available_cores(), help="of every side")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in each process")
    parser.add_argument("--json", type=Path, help="write everything measured there, after each process")
    parser.add_argument("--quick", action="store_true", help="a trial: the numbers are rough")
    return parser


def main(given: Sequence[str] | None = None) -> int:
    try:
        comparison = compared(arguments().parse_args(given))
    except GemmakitError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    result = comparison.run()
    print("\n".join(plain_lines(comparison_table(result))))
    return 130 if result["interrupted"] else int(result["ours"] not in result["sides"])


if __name__ == "__main__":
    sys.exit(main())
