"""The programs that are measured beside gemmakit, each in an environment of its own: `make peers` makes them.

    python benchmarks/peers.py [openvino onnxruntime llama.cpp transformers]

They are kept in .peers/NAME of the checkout, or under GEMMAKIT_PEERS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gemmakit.errors import MissingDependency

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "openvino": "openvino_genai",
           "onnxruntime": "onnxruntime_genai"}  # fmt: skip
PEERS = tuple(MODULES)


def folder() -> Path:
    return Path(os.environ.get("GEMMAKIT_PEERS") or ROOT / ".peers")


def interpreter(peer: str) -> str:
    """The Python that has this program: that of `make peers`, else this one. Raises MissingDependency."""
    python = folder() / peer / "bin" / "python"
    if python.exists() and (folder() / peer / "requirements.txt").exists():  # written at the end
        return str(python)
    if find_spec(MODULES[peer]) is not None:
        return sys.executable
    raise MissingDependency(f"{peer} is not installed: `make peers PEERS={peer}` puts it into {folder() / peer}.")


def main() -> int:
    sys.path.insert(0, str(ROOT / "scripts"))
    from environments import environment, listed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", help=f"which of {', '.join(PEERS)}; all without any")
    peers = parser.parse_args().peers or PEERS
    if unknown := {*peers} - {*PEERS}:
        parser.error(f"no program {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}.")
    needed, failed = listed(ROOT / "benchmarks" / "peers.txt"), []
    for peer in peers:
        print(f"== {peer}: {' '.join(p for call in needed[peer] for p in call)}", flush=True)
        try:
            print(environment(folder() / peer, needed[peer]), flush=True)
        except subprocess.CalledProcessError as error:
            print(f"{peer} was not installed: {error}", file=sys.stderr)
            failed.append(peer)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
