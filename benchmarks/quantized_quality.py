"""What quantization costs the demo model: held-out perplexity and task accuracy, each against float32.

    python benchmarks/quantized_quality.py [--tasks N] [--output benchmarks/results/quantized_quality.json]

The bitsandbytes rows need `pip install 'gemmakit[quantization]'`. Bytes are those of the weights on disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import gemmakit
from gemmakit.errors import GemmakitError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import demo_tasks  # noqa: E402 - a script of this repository, not a package

DEMO = ROOT / "gemmakit" / "demo"
Settings = dict[str, Any]


def four(kind: str, double: bool = False) -> Settings:
    """4 bits of bitsandbytes, multiplied in float32, so that only the weights differ."""
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    return {"dtype": torch.float32, "quantization_config": config}


ROWS: dict[str, Settings] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "quantization_config": {"load_in_8bit": True}},
    "nf4": four("nf4"),
    "nf4, double": four("nf4", double=True),
    "fp4": four("fp4"),
    "fp4, double": four("fp4", double=True),
}


def measure(settings: Settings, ids: list[int], tokenizer: Any, tasks: int) -> dict[str, float]:
    """perplexity, accuracy (mean over the tasks, 0 to 1) and bytes on disk of one row."""
    model = gemmakit.GemmaForCausalLM.from_pretrained(DEMO, **settings)
    generate = demo_tasks.greedy(model, tokenizer)
    shares = [demo_tasks.accuracy(generate, demo_tasks.held_out(task, tasks)) for task in demo_tasks.TASKS]
    return {
        "perplexity": demo_tasks.perplexity(model, ids)[0],
        "accuracy": sum(shares) / len(shares),
        "bytes": stored_bytes(model),
    }


def stored_bytes(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=50, help="questions a task")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = gemmakit.GemmaTokenizer.from_pretrained(DEMO)
    text = (ROOT / "benchmarks" / "data" / "held_out.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows: dict[str, Any] = {}
    print(f"{'weights':12} {'perplexity':>10} {'ratio':>7} {'accuracy':>8} {'MB':>6}")
    for name, settings in ROWS.items():
        try:
            rows[name] = row = measure(settings, ids, tokenizer, options.tasks)
        except GemmakitError as e:
            print(f"{name:12} {e}")
            continue
        row["ratio"] = row["perplexity"] / rows["float32"]["perplexity"]
        print(
            f"{name:12} {row['perplexity']:10.4f} {row['ratio']:7.4f} {row['accuracy']:8.1%} {row['bytes'] / 1e6:6.2f}"
        )
    if options.output is not None:
        about = {"python": platform.python_version(), "torch": torch.__version__, "tokens": len(ids),
                 "questions_a_task": options.tasks, "model": "gemmakit/demo"}  # fmt: skip
        options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
