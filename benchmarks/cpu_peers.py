"""All that the CPU has to show, on random weights of the 2B shape, in turn with the programs of `make peers`.

    python benchmarks/cpu_peers.py [--part bf16 int8 ...] [--checkpoint FOLDER]

Each part is a comparison as compare.py makes it and a file in benchmarks/results/, written after every
measurement: Ctrl-C keeps what there is. What the others read is written beside the checkpoint, once; --gguf has GGUF
files of another tool (any whose name ends in F16.gguf, Q8_0.gguf, Q4_0.gguf). A program that is not installed is left
out, with a word.
"""

import argparse
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import peer_models
import torch
from checkpoints import cached_codes, cached_random, fields
from compare import Comparison, if_possible, llamacpp_side, transformers_side, written_side
from peers import interpreter
from report import comparison_table, plain_lines
from rounds import Side

from gemmakit.bench.measure import matmul_rate
from gemmakit.cli.env import available_cores

RESULTS = Path(__file__).parent / "results"
QUICK = {"limit_s": 0.05, "limit_bytes": 1 << 20, "tokens": 256}
# part -> its file, what it sets, and its peers as (program, dtype or GGUF type or quantization). Q4_0 has its head in
# Q8_0, as our converter writes it; Q4_0-all, another tool's file, in Q4_0 too, and is used where --gguf has it. In 16
# bits onnxruntime is not there: it has no such products on a CPU, and twice the bytes are nothing to compare with.
# transformers computes in float32 where `plain` says so.
PARTS: dict[str, dict[str, Any]] = {
    "bf16": dict(file="cpu_decode_2b_bf16",
                 peers=[("transformers", "bfloat16"), ("llama.cpp", "F16"), ("llama.cpp", "BF16"), ("openvino", "16")]),
    "int8": dict(file="cpu_decode_2b_int8", quantize="int8",
                 peers=[("transformers", "bfloat16"), ("llama.cpp", "Q8_0"), ("openvino", "int8"),
                        ("onnxruntime", "int8")]),
    "int4": dict(file="cpu_decode_2b_int4", quantize="int4",
                 peers=[("gemmakit", "int4-a8"), ("transformers", "bfloat16"), ("llama.cpp", "Q4_0"),
                        ("llama.cpp", "Q4_0-all"), ("openvino", "int4"), ("onnxruntime", "int4")]),
    "int4-g128": dict(file="cpu_decode_2b_int4-g128", quantize="int4-g128",
                      peers=[("llama.cpp", "Q4_0"), ("llama.cpp", "Q4_0-all"), ("openvino", "int4-g128"),
                             ("onnxruntime", "int4-g128")]),
    "prefill": dict(file="cpu_prefill_2b_256", prompt=256, new=2,
                    peers=[("transformers", "float32"), ("transformers", "bfloat16"), ("llama.cpp", "F16"),
                           ("llama.cpp", "BF16"), ("openvino", "16")]),
    "prefill-int8": dict(file="cpu_prefill_2b_256_int8", prompt=256, new=2, quantize="int8",
                         peers=[("transformers", "bfloat16"), ("llama.cpp", "Q8_0"), ("openvino", "int8"),
                                ("onnxruntime", "int8")]),
    "prefill-int4": dict(file="cpu_prefill_2b_256_int4", prompt=256, new=2, quantize="int4",
                         peers=[("transformers", "bfloat16"), ("llama.cpp", "Q4_0"), ("openvino", "int4"),
                                ("onnxruntime", "int4")]),
    # The context is random keys and values of the right shape: as fast to read as real ones, and there at once.
    "context": dict(file="cpu_context_2b", contexts=(0, 4096), new=32, peers=[("gemmakit", "int4")]),
    # Both read the same codes, gemmakit from a folder, llama.cpp from a GGUF file.
    "gemma4-e2b": dict(file="cpu_decode_gemma4_e2b_int4", codes="gemma4-e2b",
                       peers=[("gemmakit", "int4-a8"), ("llama.cpp", "Q4_0")]),
    "gemma4-12b": dict(file="cpu_decode_gemma4_12b_int4", codes="gemma4-12b",
                       peers=[("gemmakit", "int4-a8"), ("llama.cpp", "Q4_0")]),
    # No file: each weight is drawn and quantized before the next, so the peak is the packed model and one weight.
    "7b": dict(file="cpu_decode_7b_int4", size="7b", quantize="int4", peers=[]),
}  # fmt: skip


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def gguf_file(kind: str, args: argparse.Namespace) -> Path:
    """A GGUF of the checkpoint: one that is there, or a new one."""
    named = re.compile(rf"(.*[^A-Za-z0-9])?{kind}\.gguf")  # not a BF16 for an F16
    there = [f for folder in (args.gguf, args.checkpoint) if folder is not None for f in sorted(folder.glob("*.gguf"))]
    found = next((file for file in there if named.fullmatch(file.name)), None)
    return found or peer_models.gguf(args.checkpoint, kind, args.gguf and args.gguf / f"{kind}.gguf", note)


def quantized(checkpoint: Path, scheme: str) -> Path:
    """The checkpoint as `gemmakit quantize` writes it, beside it."""
    from gemmakit import quantize_checkpoint

    folder = checkpoint.with_name(f"{checkpoint.name}-{scheme}")
    if not folder.exists():
        note(f"writing {folder}")
        quantize_checkpoint(checkpoint, folder, scheme)
    return folder


@lru_cache
def plain(dtype: str, threads: int) -> str:
    """The dtype for transformers: where torch emulates products of bfloat16, they take hundreds of times longer."""
    torch.set_num_threads(threads)
    rates = {d: matmul_rate(torch.device("cpu"), d, 0.2) for d in ("bfloat16", "float32")}
    return "float32" if 4 * rates["bfloat16"] < rates["float32"] else dtype


def peer(program: str, kind: str, comparison: Comparison, args: argparse.Namespace) -> Side | None:
    """The side of a peer; None, with a word, where it is not installed or cannot write its model."""
    if program == "gemmakit":
        model = comparison.model if args.codes is not None else str(quantized(args.checkpoint, kind))
        spec = {**comparison.spec, "model": model, "quantize": kind}
        return Side(f"gemmakit {kind}", "gemmakit_side", spec)
    if kind.endswith("-all") and (args.gguf is None or not (args.gguf / f"{kind}.gguf").exists()):
        return None

    def make() -> Side:
        if program == "transformers":
            return transformers_side(comparison.spec, kind, interpreter(program), model=str(args.checkpoint))
        if program == "llama.cpp":
            python = args.llama_python or interpreter(program)
            file = gguf_file(kind, args) if args.codes is None else args.codes
            return llamacpp_side(comparison.spec, file, python, label=kind)
        return written_side(program, comparison.spec, args.checkpoint, kind, note)

    return if_possible(f"{program} {kind}", make, note)


def measure(name: str, args: argparse.Namespace) -> None:
    part = {**PARTS[name]}
    file, peers, size, codes = (part.pop(key, None) for key in ("file", "peers", "size", "codes"))
    if args.quick:
        part |= {"new": max(2, part.get("new", 0) // 8)}
    shape = codes or size or args.size
    scheme, args.codes = part.get("quantize"), None
    if codes:
        model, args.codes = cached_codes(codes, say=note)
    else:
        model = quantized(args.checkpoint, scheme) if scheme and not size else args.checkpoint
    comparison = Comparison(
        model=str(model), name=f"Gemma {shape.upper()} shape", random=True, dtype="auto" if codes else "bfloat16",
        config=fields(size) if size else None, threads=args.threads, rounds=args.rounds, repeats=args.repeats,
        in_turn=args.in_turn, more=QUICK if args.quick else None, save=args.out / f"{file}.json",
        say=lambda m: note(f"{name}: {m}"), **part,
    )  # fmt: skip
    peers = [(p, kind) for p, kind in peers if args.program is None or p in (*args.program, "gemmakit")]
    peers = dict.fromkeys((p, plain(kind, args.threads) if p == "transformers" else kind) for p, kind in peers)
    comparison.peers = [side for program, kind in peers if (side := peer(program, kind, comparison, args))]
    result = comparison.run()
    print("\n".join(plain_lines(comparison_table(result))), flush=True)
    if result["interrupted"]:
        sys.exit(130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--checkpoint", type=Path, help="of the 2B shape; random weights are written if left out")
    parser.add_argument("--size", default="2b", help="shape of the checkpoint that is written: 2b, or tiny for a trial")
    parser.add_argument("--gguf", type=Path, help="folder of GGUF files of these weights")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python, instead of that of make peers")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=3, help="processes a side")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a process")
    parser.add_argument("--in-turn", action="store_true", help="one process a side, whose timed runs take turns")
    parser.add_argument(
        "--program", nargs="+", help="of the others only these, as where they do not fit memory together"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a trial: the numbers are rough")
    args = parser.parse_args()
    if args.checkpoint is None and any("codes" not in PARTS[name] for name in args.part):
        args.checkpoint = cached_random(args.size, say=note)
    for name in args.part:
        measure(name, args)


if __name__ == "__main__":
    main()
