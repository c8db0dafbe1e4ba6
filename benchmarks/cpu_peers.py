"""All that the CPU has to show, on random weights of the 2B shape, in turn with transformers and llama.cpp.

    python benchmarks/cpu_peers.py --llama-python llama/bin/python [--part bf16 int8 ...] [--checkpoint FOLDER]

Each part is a comparison as compare.py makes it and a file in benchmarks/results/, written after every
measurement: Ctrl-C keeps what there is. GGUF files are written beside the checkpoint by gemmakit's converter unless
--gguf has them (any file whose name ends in F16.gguf, Q8_0.gguf, Q4_0.gguf). Peers that are not installed are left out,
and the result says so.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checkpoints import cached_codes, cached_random, fields
from compare import Comparison, llamacpp_side, transformers_side
from report import comparison_table, plain_lines
from rounds import Side

from gemmakit.cli.env import available_cores

RESULTS = Path(__file__).parent / "results"
QUICK = {"limit_s": 0.05, "limit_bytes": 1 << 20, "tokens": 256}
# part -> its file, what it sets, and its peers as (program, dtype or GGUF type or quantization). Q4_0 has its head in
# Q8_0, as our converter writes it; Q4_0-all, another tool's file, in Q4_0 too, and is used where --gguf has it.
PARTS: dict[str, dict[str, Any]] = {
    "bf16": dict(file="cpu_decode_2b_bf16", peers=[("transformers", "bfloat16"), ("llama.cpp", "F16")]),
    "int8": dict(file="cpu_decode_2b_int8", quantize="int8",
                 peers=[("transformers", "bfloat16"), ("llama.cpp", "Q8_0")]),
    "int4": dict(file="cpu_decode_2b_int4", quantize="int4",
                 peers=[("transformers", "bfloat16"), ("llama.cpp", "Q4_0"), ("llama.cpp", "Q4_0-all")]),
    "int4-g128": dict(file="cpu_decode_2b_int4-g128", quantize="int4-g128",
                      peers=[("llama.cpp", "Q4_0"), ("llama.cpp", "Q4_0-all")]),
    "prefill": dict(file="cpu_prefill_2b_256", prompt=256, new=2,
                    peers=[("transformers", "float32"), ("transformers", "bfloat16"), ("llama.cpp", "F16")]),
    "prefill-int8": dict(file="cpu_prefill_2b_256_int8", prompt=256, new=2, quantize="int8",
                         peers=[("transformers", "bfloat16"), ("llama.cpp", "Q8_0")]),
    "prefill-int4": dict(file="cpu_prefill_2b_256_int4", prompt=256, new=2, quantize="int4",
                         peers=[("transformers", "bfloat16"), ("llama.cpp", "Q4_0")]),
    # The context is random keys and values of the right shape: as fast to read as real ones, and there at once.
    "context": dict(file="cpu_context_2b", contexts=(0, 4096), new=32, peers=[("gemmakit", "int4")]),
    # Both read the same codes, gemmakit from a folder, llama.cpp from a GGUF file.
    "gemma4-e2b": dict(file="cpu_decode_gemma4_e2b_int4", codes="gemma4-e2b", peers=[("llama.cpp", "Q4_0")]),
    "gemma4-12b": dict(file="cpu_decode_gemma4_12b_int4", codes="gemma4-12b", peers=[("llama.cpp", "Q4_0")]),
    # No file: each weight is drawn and quantized before the next, so the peak is the packed model and one weight.
    "7b": dict(file="cpu_decode_7b_int4", size="7b", quantize="int4", peers=[]),
}  # fmt: skip


def gguf_file(kind: str, args: argparse.Namespace) -> Path:
    """A GGUF of the checkpoint: one that is there, or a new one."""
    for folder in filter(None, (args.gguf, args.checkpoint)):
        found = sorted(folder.glob(f"*{kind}.gguf"))
        if found:
            return found[0]
    return write_gguf_of(args.checkpoint, (args.gguf or args.checkpoint) / f"{kind}.gguf", kind)


def write_gguf_of(checkpoint: Path, path: Path, kind: str) -> Path:
    """The checkpoint's weights with the demo model's vocabulary, padded to the shape's: for timing alone."""
    from gemmakit import GemmaConfig, GemmaTokenizer, demo_model
    from gemmakit.checkpoint import open_checkpoint
    from gemmakit.checkpoint.formats.gguf_writing import write_gguf
    from gemmakit.text.gguf import vocabulary_of

    print(f"writing {path}", file=sys.stderr)
    with open_checkpoint(checkpoint) as opened:
        tensors = {name: lambda name=name: opened.tensor(name, device="cpu") for name in opened.names()}
        vocabulary = vocabulary_of(GemmaTokenizer.from_pretrained(demo_model()))
        return write_gguf(path, GemmaConfig.from_pretrained(checkpoint), tensors, vocabulary, kind)


def quantized(checkpoint: Path, scheme: str) -> Path:
    """The checkpoint as `gemmakit quantize` writes it, beside it."""
    from gemmakit import quantize_checkpoint

    folder = checkpoint.with_name(f"{checkpoint.name}-{scheme}")
    if not folder.exists():
        print(f"writing {folder}", file=sys.stderr)
        quantize_checkpoint(checkpoint, folder, scheme)
    return folder


def peer(program: str, kind: str, comparison: Comparison, args: argparse.Namespace) -> Side | None:
    """The side of a peer; None, with a word, where it is not installed."""
    if program == "gemmakit":
        spec = {**comparison.spec, "model": str(quantized(args.checkpoint, kind)), "quantize": kind}
        return Side(f"gemmakit {kind}", "gemmakit_side", spec)
    if program == "transformers":
        if find_spec("transformers") is not None:
            return transformers_side(comparison.spec, kind, model=str(args.checkpoint))
        print("transformers is not installed: left out", file=sys.stderr)
        return None
    if args.llama_python is None:
        print(
            "llama.cpp is left out: name an interpreter that has llama-cpp-python with --llama-python", file=sys.stderr
        )
        return None
    if args.codes is not None:
        side = llamacpp_side(comparison.spec, args.codes, args.llama_python)
        return Side(f"llama.cpp {kind}", side.script, side.spec, side.python)
    if kind.endswith("-all") and (args.gguf is None or not (args.gguf / f"{kind}.gguf").exists()):
        return None
    side = llamacpp_side(comparison.spec, gguf_file(kind, args), args.llama_python)
    return Side(f"llama.cpp {kind}", side.script, side.spec, side.python)


def measure(name: str, args: argparse.Namespace) -> None:
    part = {**PARTS[name]}
    file, peers, size, codes = (part.pop(key, None) for key in ("file", "peers", "size", "codes"))
    if args.quick:
        part |= {"new": max(2, part.get("new", 0) // 8)}
    shape = codes or size or args.size
    scheme, args.codes = part.get("quantize"), None
    if codes:
        model, args.codes = cached_codes(codes, say=lambda m: print(m, file=sys.stderr))
    else:
        model = quantized(args.checkpoint, scheme) if scheme and not size else args.checkpoint
    comparison = Comparison(
        model=str(model), name=f"Gemma {shape.upper()} shape", random=True, dtype="auto" if codes else "bfloat16",
        config=fields(size) if size else None, threads=args.threads, rounds=args.rounds, repeats=args.repeats,
        more=QUICK if args.quick else None, save=args.out / f"{file}.json",
        say=lambda m: print(f"{name}: {m}", file=sys.stderr), **part,
    )  # fmt: skip
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
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=3, help="processes a side")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a trial: the numbers are rough")
    args = parser.parse_args()
    if args.checkpoint is None and any("codes" not in PARTS[name] for name in args.part):
        args.checkpoint = cached_random(args.size, say=lambda m: print(m, file=sys.stderr))
    for name in args.part:
        measure(name, args)


if __name__ == "__main__":
    main()
