"""One model, measured against the machine's limits and, in turn, beside other programs: `make peers` installs them.

    python benchmarks/compare.py [MODEL | --size 2b] --peer transformers [--quantize int8] [--json FILE]
    python benchmarks/compare.py FOLDER --peer openvino --peer onnxruntime --peer llama.cpp [--gguf FILE]

Each measurement is a fresh process, and the sides take turns; Ctrl-C keeps what there is. With --in-turn each side is
one process, and their timed runs take turns, which a shared machine wants; Ctrl-C then keeps nothing. What the others
read is written from the folder once, in as many bits as ours, and kept beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_models
from checkpoints import cached_random
from peers import PEERS, interpreter
from report import comparison_table, plain_lines
from rounds import Found, Rounds, Side, SideFailed, in_turn, interleave, run_command

from gemmakit import demo_model
from gemmakit.bench.measure import scheme_config, shares
from gemmakit.bench.timing import Work
from gemmakit.cli.env import about, available_cores
from gemmakit.errors import GemmakitError, InputError, MissingDependency
from gemmakit.files import write_text

LIMITS = ("limits", "limits again")  # measured before and behind gemmakit, in every round
WHAT = (
    "load, first token, prefill and greedy decoding of one prompt, choosing tokens included; each side a fresh process"
)
IN_TURN = ", one for all rounds, in which the timed runs of all sides take turns"


@dataclass
class Comparison:
    """What to measure, and where to say and keep what comes of it.

    Args:
        model: a folder or a name on the Hub. name: what to call it. random: its weights are random.
        config: instead of a model: fields of a configuration, for random weights made in gemmakit's process.
        quantize: a short name, for gemmakit's side.
        peers: sides besides gemmakit's, see `peer_sides`.
        contexts: tokens in the cache before decoding is timed; 0 is right behind the prompt.
        repeats: timed runs in a process; rounds: processes a side, of which there is one where the runs are in_turn.
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
    in_turn: bool = False
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
            "in_turn": self.in_turn,
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
        if self.in_turn:
            done = in_turn(sides, say=self.say)
            keep(done)
        else:
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
            "what": WHAT + IN_TURN * self.in_turn,
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


def transformers_side(spec: dict[str, Any], dtype: str, python: str = sys.executable, **changes: Any) -> Side:
    """transformers on the same folder, in its dtype ("auto" there as here)."""
    named = {**spec, "dtype": dtype, **changes}
    return Side(f"transformers {short(dtype)}".strip(), "transformers_side", named, python)


def llamacpp_side(spec: dict[str, Any], file: str | Path, python: str, label: str | None = None) -> Side:
    """llama.cpp on a GGUF file, named by it, run by an interpreter that has llama-cpp-python."""
    path = Path(file)
    return Side(f"llama.cpp {label or path.stem}", "llamacpp", {**spec, "model": str(path.absolute())}, python)


def written_side(peer: str, spec: dict[str, Any], checkpoint: Path, kind: str, say: Callable[[str], None]) -> Side:
    """OpenVINO or onnxruntime on a folder that its tools write. Raises SideFailed where these cannot."""
    label, write = {
        "openvino": ("OpenVINO", peer_models.openvino),
        "onnxruntime": ("onnxruntime", peer_models.onnxruntime),
    }[peer]
    model = str(write(checkpoint, kind, say).absolute())
    said = {"16": "16 bits"}.get(kind, kind)
    return Side(f"{label} {said}", f"{peer}_side", {**spec, "model": model}, interpreter(peer))


def if_possible(name: str, make: Callable[[], Side], say: Callable[[str], None]) -> Side | None:
    """The side; None, with a word, where the program is not installed or cannot write its model."""
    try:
        return make()
    except (MissingDependency, SideFailed) as error:
        say(f"{name} is left out: {error}")
        return None


def peer_sides(peer: str, comparison: Comparison, args: argparse.Namespace) -> list[Side]:
    """The sides of a peer, in as many bits as ours."""
    spec, say, checkpoint = comparison.spec, comparison.say, Path(comparison.model)
    kind = peer_models.kind_of(args.quantize)
    if peer == "transformers":
        return [transformers_side(spec, args.dtype, interpreter(peer))]
    if peer == "llama.cpp":
        kind = peer_models.GGUF_TYPES[kind]
        named = dict.fromkeys(args.gguf) or {peer_models.gguf(checkpoint, kind, say=say): kind}
        python = args.llama_python or interpreter(peer)
        return [llamacpp_side(spec, file, python, label) for file, label in named.items()]
    kind = kind if peer == "openvino" else peer_models.ONNXRUNTIME_KINDS[kind]
    return [written_side(peer, spec, checkpoint, kind, say)]


def refused(args: argparse.Namespace) -> None:
    """Raises InputError and MissingDependency, before anything is measured."""
    if args.model is not None and args.size is not None:
        raise InputError(f"{args.model!r} and --size {args.size} are both given: give one of them.")
    scheme_config(args.quantize)
    for file in args.gguf:
        if not file.is_file():
            raise InputError(f"--gguf {file}: there is no such file.")
    for peer in args.peer:
        if peer != "llama.cpp" or not args.llama_python:
            interpreter(peer)
        if peer == "transformers":
            continue
        if args.device != "cpu":
            raise InputError(f"--peer {peer} is measured on the CPU only: leave --device out.")
        reads_files = peer == "llama.cpp" and args.gguf
        if args.model is not None and not reads_files and not Path(args.model, "config.json").is_file():
            raise InputError(f"--peer {peer} gets its model from a folder with config.json: {args.model!r} is none.")


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
        rounds=args.rounds, repeats=args.repeats, in_turn=args.in_turn, save=args.json, say=say,
        more=quick if args.quick else None,
    )  # fmt: skip
    comparison.peers = [side for peer in dict.fromkeys(args.peer) for side in peer_sides(peer, comparison, args)]
    return comparison


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub id; if left out, the demo model")
    parser.add_argument("--size", help="random weights in the shape 2b, 7b or tiny, instead of a model")
    parser.add_argument("--peer", action="append", choices=PEERS, default=[], help="may be repeated")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python, instead of that of make peers")
    parser.add_argument(
        "--gguf", type=Path, action="append", default=[],
        help="for llama.cpp, instead of a file made of the folder; may be repeated",
    )  # fmt: skip
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
    parser.add_argument("--in-turn", action="store_true", help="one process a side, whose timed runs take turns")
    parser.add_argument("--json", type=Path, help="write everything measured there, after each process")
    parser.add_argument("--quick", action="store_true", help="a trial: the numbers are rough")
    return parser


def main(given: Sequence[str] | None = None) -> int:
    try:
        comparison = compared(arguments().parse_args(given))
    except (GemmakitError, SideFailed) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    result = comparison.run()
    print("\n".join(plain_lines(comparison_table(result))))
    return 130 if result["interrupted"] else int(result["ours"] not in result["sides"])


if __name__ == "__main__":
    sys.exit(main())
