"""The models of other programs, written from a checkpoint the first time and kept beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from checkpoints import cache
from peers import interpreter
from rounds import Side, run_command

from gemmakit import GemmaConfig, GemmaTokenizer, demo_model
from gemmakit.bench.measure import scheme_config
from gemmakit.checkpoint import open_checkpoint
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.errors import InputError
from gemmakit.text.gguf import vocabulary_of

Say = Callable[[str], None]
# Kinds of weights, OpenVINO's names for them, -> the same in another program's words, as near as it comes.
GGUF_TYPES = {"16": "BF16", "int8": "Q8_0", "int4": "Q4_0", "int4-g128": "Q4_0"}
ONNXRUNTIME_KINDS = {"16": "fp32", "int8": "int8", "int4": "int4", "int4-g128": "int4-g128"}


def kind_of(scheme: str | None) -> str:
    """The kind with as many bits, and groups as large, as a short name of ours."""
    config = scheme_config(scheme)
    if config is None:
        return "16"
    if config.bits not in (4, 8):
        raise InputError(f"--quantize {scheme} has no peer: the tools of the others write 16, 8 or 4 bits here.")
    return "int8" if config.bits == 8 else "int4-g128" if config.group_size == 128 else "int4"


def beside(checkpoint: Path, name: str) -> Path:
    """Where a checkpoint's other form is kept: next to it; of the demo model, which is the package's, in the cache."""
    return cache() / f"demo-{name}" if checkpoint == demo_model() else checkpoint.with_name(f"{checkpoint.name}-{name}")


def gguf(checkpoint: Path, kind: str, path: Path | None = None, say: Say = lambda _: None) -> Path:
    """The checkpoint's weights with the demo model's vocabulary, padded to the shape's: for timing alone."""
    path = path or beside(checkpoint, f"{kind}.gguf")
    if path.exists():
        return path
    say(f"writing {path}, kept there for the next time")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(checkpoint) as opened:
        tensors = {name: lambda name=name: opened.tensor(name, device="cpu") for name in opened.names()}
        vocabulary = vocabulary_of(GemmaTokenizer.from_pretrained(demo_model()))
        return write_gguf(path, GemmaConfig.from_pretrained(checkpoint), tensors, vocabulary, kind)


def openvino(checkpoint: Path, kind: str, say: Say = lambda _: None) -> Path:
    """A folder for openvino_side.py; kinds of fewer bits are made of that of 16."""
    source = checkpoint if kind == "16" else openvino(checkpoint, "16", say)
    return written("openvino", source, beside(checkpoint, f"openvino-{kind}"), kind, say)


def onnxruntime(checkpoint: Path, kind: str, say: Say = lambda _: None) -> Path:
    """A folder for onnxruntime_side.py. Its builder wants a tokenizer: the demo model's, where there is none."""
    out = beside(checkpoint, f"onnxruntime-{kind}")
    if (out / "written.json").exists() or [*checkpoint.glob("tokenizer*")]:
        return written("onnxruntime", checkpoint, out, kind, say)
    together = out.with_name(out.name + "-source")
    together.mkdir(parents=True, exist_ok=True)
    try:
        for file in (*checkpoint.iterdir(), *demo_model().glob("*token*")):
            (together / file.name).symlink_to(file.resolve())
        return written("onnxruntime", together, out, kind, say)
    finally:
        shutil.rmtree(together)


def written(peer: str, source: Path, out: Path, kind: str, say: Say) -> Path:
    """`out`, made by the peer's own tools unless it is there. Raises SideFailed, MissingDependency."""
    if (out / "written.json").exists():
        return out
    say(f"writing {out}, kept there for the next time")
    shutil.rmtree(out, ignore_errors=True)  # what an interrupted run left
    spec = {"model": str(source), "out": str(out), "kind": kind}
    told = run_command(Side(peer, f"{peer}_write", spec, interpreter(peer)).command)
    (out / "written.json").write_text(json.dumps(told, indent=1) + "\n")
    return out
