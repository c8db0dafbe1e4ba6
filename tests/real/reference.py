"""What llama.cpp says of the real Gemma 3 270M, kept in reference.json: the file's SHA-256 fixes both.

    GEMMAKIT_LLAMA_PYTHON=PYTHON python tests/real/reference.py [THREADS]

writes it anew, by a Python that has llama-cpp-python. Keys and values in float32; products as llama.cpp makes them on
a CPU, which rounds activations to 8 bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gemmakit.hub import models_folder
from gemmakit.text import GemmaTokenizerFast

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("reference.json")
HELD_OUT = ROOT / "benchmarks" / "data" / "held_out.txt"
NEW_TOKENS, WINDOW, LONG = 40, 512, 2000
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colours are",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "import json\n\ndef read_config(path):\n",
    "The first law of thermodynamics states that",
    "To make a good cup of coffee, first",
    "Die Hauptstadt von Deutschland ist",
    "La tour Eiffel est",
    "El perro es un animal",
    "1, 2, 3, 4, 5,",
    "Q: What is the largest planet?\nA:",
    "In 1969, astronauts",
    "The novel begins with",
    "SELECT name FROM users WHERE",
    "# Introduction\n\nThis document describes",
    "Dear Sir or Madam,\n\nI am writing to",
    "The mitochondria are",
    "日本の首都は",
)


def windows(tokenizer: GemmaTokenizerFast) -> list[list[int]]:
    """The held-out text in pieces of WINDOW ids, a <bos> before each; what is left at its end is left out."""
    ids, step = tokenizer(HELD_OUT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"], WINDOW - 1
    return [[tokenizer.bos_token_id, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]


def long_prompt(tokenizer: GemmaTokenizerFast) -> list[int]:
    """LONG ids: several windows of the model's own."""
    return tokenizer(HELD_OUT.read_text(encoding="utf-8"))["input_ids"][:LONG]


def main() -> None:
    gguf, threads = models_folder() / "gemma3-270m.gguf", int(sys.argv[1]) if sys.argv[1:] else 1
    tokenizer = GemmaTokenizerFast.from_pretrained(str(gguf))
    pieces = windows(tokenizer)
    job = {
        "gguf": str(gguf), "texts": list(PROMPTS), "special": True, "new_tokens": NEW_TOKENS,
        "prompts": [*tokenizer(list(PROMPTS))["input_ids"], long_prompt(tokenizer)],
        "context": LONG + 304, "pieces": pieces, "threads": threads,
    }  # fmt: skip
    worker = ROOT / "tests" / "parity" / "llama_worker.py"
    command = [os.environ["GEMMAKIT_LLAMA_PYTHON"], str(worker)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    kept = {name: found[name] for name in ("ids", "continuations", "gaps", "losses")}
    kept["gaps"] = [[round(gap, 4) for gap in gaps] for gaps in kept["gaps"]]
    FILE.write_text(json.dumps({**kept, "tokens": [len(piece) - 1 for piece in pieces]}) + "\n")


if __name__ == "__main__":
    main()
