"""What each form costs the real Gemma 3 270M: perplexity on held-out text, beside llama.cpp's of the same file.

    make real; python benchmarks/real_quality.py [--only FORM ...] [--windows N] [--output FILE]

Windows of 512 tokens of benchmarks/data/held_out.txt, each after a <bos>, as llama.cpp was asked for
(tests/real/reference.py). The forms are made from the numbers of the file's Q4_K_M blocks, so their cost comes on top
of that of those blocks. Each is saved, loaded again and measured; a row is written as soon as it is known, beside
those of other forms that are there for as many tokens. `python benchmarks/quality_table.py` then writes the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from two_commits import processor

import gemmakit
from gemmakit.hub import packaged_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "real"))
import reference  # noqa: E402 - of this repository, no package

OUTPUT = ROOT / "benchmarks" / "results" / "real_quality.json"
# Weights in 8 or 4 bits: the scheme, and to how many bits a prompt's activations may be rounded.
SCHEMES = {
    "int8": ("int8", 8),
    "int8, activations unrounded": ("int8", 16),
    "int4 g32": ("int4", 8),
    "int4 g32, activations unrounded": ("int4", 16),
    "int4 g128": ("int4-g128", 8),
}
BLOCKS = ("Q8_0", "Q4_0")


def loaders(stored: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], tuple[Path, dict[str, Any]]]]]:
    """(form, what makes its files and says how to load them)."""

    def saved(dtype: str) -> tuple[Path, dict[str, Any]]:
        out = scratch / dtype
        if not out.exists():
            gemmakit.convert_checkpoint(stored, out, dtype=dtype)
        return out, {}

    def quantized(scheme: str, bits: int) -> tuple[Path, dict[str, Any]]:
        out = scratch / scheme
        if not out.exists():
            gemmakit.quantize_checkpoint(saved("bfloat16")[0], out, scheme)
        config = gemmakit.AutoConfig.from_pretrained(out).extra["quantization_config"]
        return out, {"quantization_config": {**config, "activation_bits": bits}}

    def blocks(kind: str) -> tuple[Path, dict[str, Any]]:
        out = scratch / f"{kind}.gguf"
        gemmakit.convert_checkpoint(stored, out, type=kind, dtype="float32")
        return out, {}

    yield "float32", lambda: saved("float32")
    yield "as stored", lambda: (stored, {})
    yield "bfloat16", lambda: saved("bfloat16")
    for name, (scheme, bits) in SCHEMES.items():
        yield name, lambda scheme=scheme, bits=bits: quantized(scheme, bits)
    for kind in BLOCKS:
        yield kind, lambda kind=kind: blocks(kind)


def weight_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))


@torch.no_grad()
def loss(model: Any, piece: list[int]) -> float:
    """Sum of -log p of a piece's tokens but the first."""
    ids = torch.tensor([piece])
    logits = model(ids).logits[0, :-1]
    # A part of the positions at a time: of all of them, float32 logits of 262,144 words are half a gigabyte.
    parts = zip(logits.split(64), ids[0, 1:].split(64), strict=True)
    return sum(float(torch.nn.functional.cross_entropy(a.float(), b, reduction="sum")) for a, b in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FORM", help="the forms to measure, by name")
    parser.add_argument("--windows", type=int, help="of the text's beginning; by default all")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    stored = packaged_model("gemma3-270m")
    assert stored is not None
    tokenizer = gemmakit.GemmaTokenizerFast.from_pretrained(str(stored))
    pieces = reference.windows(tokenizer)[: options.windows]
    about = {"tokens": sum(len(piece) - 1 for piece in pieces), "window": reference.WINDOW, "processor": processor(),
             "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    rows = found["rows"] if found.get("about", {}).get("tokens") == about["tokens"] else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in loaders(stored, Path(scratch)):
            if options.only and name not in options.only:
                continue
            start = time.perf_counter()
            path, how = make()
            model = gemmakit.AutoModelForCausalLM.from_pretrained(path, **how)
            rows[name] = {"loss": sum(loss(model, piece) for piece in pieces), "bytes": weight_bytes(path)}
            print(
                f"{name:<32} {rows[name]['loss'] / about['tokens']:9.5f} {time.perf_counter() - start:6.0f} s",
                flush=True,
            )
            options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
