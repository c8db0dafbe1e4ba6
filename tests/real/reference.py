"""What llama.cpp says of the real Gemma 3 270M, kept in reference.json: the file's SHA-256 fixes both.

    GEMMAKIT_LLAMA_PYTHON=PYTHON python tests/real/reference.py [float32|stored] [--windows N] [--threads N]

asks it anew, by a Python that has llama-cpp-python: of the file as it is "stored", where it rounds what products read
to 8 bits, and of "float32", the same weights as numbers in a GGUF file that gemmakit writes, where it does not. Keys
and values in float32 both times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gemmakit
from gemmakit.hub import models_folder
from gemmakit.text import GemmaTokenizerFast

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("reference.json")
HELD_OUT = ROOT / "benchmarks" / "data" / "held_out.txt"
NEW_TOKENS, WINDOW, LONG = 40, 512, 2000
KINDS = ("float32", "stored")
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


def llama_cpp(job: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp answers to a job of tests/parity/llama_worker.py."""
    command = [os.environ["GEMMAKIT_LLAMA_PYTHON"], str(ROOT / "tests" / "parity" / "llama_worker.py")]
    job = {"texts": [], "special": True, **job}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[:500] + done.stderr[-2000:])
    return json.loads(done.stdout)


def asked(gguf: Path, tokenizer: GemmaTokenizerFast, pieces: list[list[int]], threads: int) -> dict[str, Any]:
    """What it says of a file of the 270M."""
    prompts = [*tokenizer(list(PROMPTS))["input_ids"], long_prompt(tokenizer)]
    return llama_cpp({
        "gguf": str(gguf), "texts": list(PROMPTS), "prompts": prompts, "new_tokens": NEW_TOKENS,
        "context": LONG + 304, "pieces": pieces, "threads": threads,
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS, help="; ".join(KINDS))
    parser.add_argument("--windows", type=int, help="of the text's beginning; by default all")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    stored = models_folder() / "gemma3-270m.gguf"
    tokenizer = GemmaTokenizerFast.from_pretrained(str(stored))
    pieces = windows(tokenizer)
    said = json.loads(FILE.read_text()) if FILE.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            gguf = stored
            if kind == "float32":
                (gguf,) = gemmakit.convert_checkpoint(stored, Path(folder) / "float32.gguf", dtype="float32")
            found = asked(gguf, tokenizer, pieces[: options.windows], options.threads)
            gaps = [[round(gap, 4) for gap in row] for row in found["gaps"]]
            said |= {
                "ids": found["ids"], "tokens": [len(piece) - 1 for piece in pieces],
                kind: {"continuations": found["continuations"], "gaps": gaps, "losses": found["losses"]},
            }  # fmt: skip
            FILE.write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
