"""Loss over bytes of the real Gemma 3 270M, ours beside llama.cpp's: what docs/quantization.md draws.

    make real; python benchmarks/real_curve.py [--only FORM ...] [--windows N] [--llama-python PATH] [--openvino]
                                               [--files FOLDER]

The weights come from a Q4_K_M file, and rounding them again to the very blocks that they lie on would cost nothing: a
grid that fits says nothing about other weights. So all start from the same function in another order: hidden, inner
and value channels are shuffled, which moves every weight into a block beside others and changes no result. llama.cpp
quantizes and is measured by itself, keys and values in float32, on the same windows of benchmarks/data/held_out.txt;
so is OpenVINO (of `make peers`), with activations in float32. Ours are calibrated, where they are, on documents of the
demo model's corpus that are not in it. Rows of other forms that are there for as many tokens stay. Files stay in
--files and are not made twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from peer_models import openvino
from peers import interpreter
from real_quality import loss, weight_bytes
from rounds import Side, run_command
from torch import Tensor
from two_commits import processor

import gemmakit
from gemmakit.hub import packaged_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "real"))
sys.path.insert(0, str(ROOT / "scripts"))
import demo_corpus  # noqa: E402 - of this repository, no packages
import reference  # noqa: E402

OUTPUT = ROOT / "benchmarks" / "results" / "real_curve.json"
# llama.cpp's kinds; "pure" gives the embedding, two thirds of this model, the kind of the rest.
KINDS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0", "Q5_0 pure", "IQ4_NL pure", "Q4_0 pure")
# OpenVINO's, embedding and head in 8 bits, as peer_models.py names them.
OPENVINO = {"OpenVINO int8": "int8", "OpenVINO int4 g32": "int4", "OpenVINO int4 g128": "int4-g128"}
# Ours: what quantize_checkpoint is told, and whether it gets the text, or "self".
OURS: dict[str, tuple[dict[str, Any], bool | Literal["self"]]] = {
    "int8": ({"quantization_config": "int8"}, False),
    "int6": ({"quantization_config": "int6"}, False),
    "int5": ({"quantization_config": "int5"}, False),
    "int4 g32": ({"quantization_config": "int4"}, False),
    "int4 g128": ({"quantization_config": "int4-g128"}, False),
    "int4 g32, calibrated": ({"quantization_config": "int4"}, True),
    "int4 g128, calibrated": ({"quantization_config": "int4-g128"}, True),
    **{f"{bits} bits": ({"bits": bits}, False) for bits in (4.5, 5, 5.5, 6, 7)},
    **{f"{bits} bits, calibrated": ({"bits": bits}, True) for bits in (4.5, 5, 5.5, 6)},
    "int4 g32, self-calibrated": ({"quantization_config": "int4"}, "self"),
    **{f"{bits} bits, self-calibrated": ({"bits": bits}, "self") for bits in (4.5, 5)},
}
TEXTS, WIDTH = 8, 256  # of the calibration
FLOAT_BYTES = 4 * 268_098_176  # of the model's weights


def shuffled(model: Any, seed: int = 0) -> None:
    """Put the channels that products sum over in another order, in place; the model computes what it did."""
    draw = torch.Generator().manual_seed(seed)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=draw)

    config, base = model.config, model.base_model
    D, H = order(config.hidden_size), config.head_dim
    base.embed_tokens.weight.data = base.embed_tokens.weight[:, D]
    base.norm.weight.data = base.norm.weight[D]
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        value, inner = order(H), order(config.intermediate_size)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, layer.pre_feedforward_layernorm,
                     layer.post_feedforward_layernorm):  # fmt: skip
            norm.weight.data = norm.weight[D]
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.data = reader.weight[:, D]
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.data = writer.weight[D]
        heads = torch.arange(0, attention.v_proj.weight.shape[0], H)[:, None] + value
        attention.v_proj.weight.data = attention.v_proj.weight[heads.flatten()]
        heads = torch.arange(0, attention.o_proj.weight.shape[1], H)[:, None] + value
        attention.o_proj.weight.data = attention.o_proj.weight[:, heads.flatten()]
        mlp.gate_proj.weight.data, mlp.up_proj.weight.data = mlp.gate_proj.weight[inner], mlp.up_proj.weight[inner]
        mlp.down_proj.weight.data = mlp.down_proj.weight[:, inner]


def calibration_ids(tokenizer: Any) -> Tensor:
    """(TEXTS, WIDTH) of documents that are not held out."""
    texts = demo_corpus.training_texts(demo_corpus.documents(), reference.HELD_OUT.read_text(encoding="utf-8"))
    ids = tokenizer("\n\n".join(random.Random(0).sample(texts, 300)), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: TEXTS * (WIDTH - 1)]).view(TEXTS, -1)
    return torch.cat((torch.full((TEXTS, 1), tokenizer.bos_token_id), rows), dim=1)


def start(files: Path) -> Path:
    """The shuffled model, as numbers in float32 in a folder, and for llama.cpp in a file beside it."""
    plain = files / "plain"
    if not (files / "float32.gguf").exists():
        stored = packaged_model("gemma3-270m")
        assert stored is not None
        gemmakit.convert_checkpoint(stored, plain, dtype="float32", overwrite=True)
        model = gemmakit.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        shuffled(model)
        model.save_pretrained(plain)
        gemmakit.convert_checkpoint(plain, files / "float32.gguf", dtype="float32")
    return plain


def our_loss(files: Path, name: str, pieces: list[list[int]], text: Tensor) -> dict[str, Any]:
    told, calibrated = OURS[name]
    out = files / name.replace(" ", "_")
    if not out.exists():
        ids = "self" if calibrated == "self" else text if calibrated else None
        gemmakit.quantize_checkpoint(start(files), out, **told, calibration_ids=ids)
    model = gemmakit.AutoModelForCausalLM.from_pretrained(out)
    return {"losses": [loss(model, piece) for piece in pieces], "bytes": weight_bytes(out)}


def their_loss(files: Path, kind: str, pieces: list[list[int]]) -> dict[str, Any]:
    out = files / f"{kind.replace(' ', '_')}.gguf"
    start(files)
    if not out.exists():
        job = {"quantize": str(files / "float32.gguf"), "gguf": str(out), "kind": kind.split()[0],
               "pure": kind.endswith("pure")}  # fmt: skip
        worker = Path(__file__).with_name("quality_llama.py")
        python = os.environ["GEMMAKIT_LLAMA_PYTHON"]
        subprocess.run([python, worker], input=json.dumps(job), check=True, text=True, capture_output=True)
    said = reference.llama_cpp({"gguf": str(out), "prompts": [], "new_tokens": 0, "pieces": pieces})
    # A GGUF file has the vocabulary too, ours lies beside the weights: what it takes is seen where weights are float32.
    vocabulary = (files / "float32.gguf").stat().st_size - FLOAT_BYTES
    return {"losses": said["losses"], "bytes": out.stat().st_size - vocabulary}


def openvino_loss(files: Path, name: str, pieces: list[list[int]]) -> dict[str, Any]:
    folder = openvino(start(files), OPENVINO[name])
    spec = {"part": "losses", "model": str(folder), "threads": os.cpu_count(), "pieces": pieces}
    said = run_command(Side("openvino", "openvino_side", spec, interpreter("openvino")).command)
    return {"losses": said["losses"], "bytes": (folder / "openvino_model.bin").stat().st_size}


def measured(files: Path, name: str, pieces: list[list[int]], text: Tensor) -> dict[str, Any]:
    if name in OURS:
        return our_loss(files, name, pieces, text)
    return openvino_loss(files, name, pieces) if name in OPENVINO else their_loss(files, name, pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FORM", help="the forms to measure, by name")
    parser.add_argument("--windows", type=int, default=4, help="of the text's beginning; 4 by default")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python; without, its own are left out")
    parser.add_argument("--openvino", action="store_true", help="measure OpenVINO's too")
    parser.add_argument("--files", type=Path, help="a folder for the models, 4 GB; by default one that goes away")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.llama_python:
        os.environ["GEMMAKIT_LLAMA_PYTHON"] = options.llama_python
    tokenizer = gemmakit.GemmaTokenizerFast.from_pretrained(str(packaged_model("gemma3-270m")))
    pieces, ids = reference.windows(tokenizer)[: options.windows], calibration_ids(tokenizer)
    tokens = sum(len(piece) - 1 for piece in pieces)
    about = {"tokens": tokens, "window": reference.WINDOW, "processor": processor(),
             "calibration": ids.numel(), "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    rows = found["rows"] if found.get("about", {}).get("tokens") == tokens else {}
    # The shuffled model's function is the stored one's, of which llama.cpp's losses in float32 are kept.
    exact = json.loads(reference.FILE.read_text())["float32"]["losses"][: len(pieces)]
    rows["float32"] = {"losses": exact, "bytes": FLOAT_BYTES}
    wanted = [*OURS, *(KINDS if options.llama_python else ()), *(OPENVINO if options.openvino else ())]
    with tempfile.TemporaryDirectory() as scratch:
        files = options.files or Path(scratch)
        for name in options.only or wanted:
            begin = time.perf_counter()
            rows[name] = measured(files, name, pieces, ids)
            lost = (sum(rows[name]["losses"]) - sum(exact)) / tokens
            took = time.perf_counter() - begin
            print(f"{name:<24} {lost:+9.5f} nats {rows[name]['bytes'] / 1e6:7.1f} MB {took:6.0f} s", flush=True)
            options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
