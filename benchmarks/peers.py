"""The programs that are measured beside gemmakit, each in an environment of its own: `make peers` makes them.

    python benchmarks/peers.py [openvino onnxruntime llama.cpp transformers gemma keras-hub]

They are kept in .peers/NAME of the checkout, or under GEMMAKIT_PEERS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from gemmakit.errors import MissingDependency

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("transformers", "llama.cpp", "openvino", "onnxruntime")  # of compare.py
FLAX_PEERS = ("gemma", "keras-hub")  # of flax_decode.py
MODULES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "openvino": "openvino_genai",
           "onnxruntime": "onnxruntime_genai", "gemma": "gemma", "keras-hub": "keras_hub"}  # fmt: skip
NEWER = {"gemma": (3, 12)}  # the Python that one needs, where it is newer than ours


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


def base(peer: str) -> str:
    """The Python to make its environment of: this one, or a newer one of the search path. Raises MissingDependency."""
    needed = NEWER.get(peer, (0,))
    if sys.version_info >= needed:
        return sys.executable
    name = "python" + ".".join(map(str, needed))
    found = which(name)
    if found is None:
        raise MissingDependency(f"{peer} needs {name}, and there is none on the search path.")
    return found


def main() -> int:
    sys.path.insert(0, str(ROOT / "scripts"))
    from environments import environment, listed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", help=f"which of {', '.join(MODULES)}; all without any")
    peers = parser.parse_args().peers or MODULES
    if unknown := {*peers} - {*MODULES}:
        parser.error(f"no program {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}.")
    needed, failed = listed(ROOT / "benchmarks" / "peers.txt"), []
    for peer in peers:
        print(f"== {peer}: {' '.join(p for call in needed[peer] for p in call)}", flush=True)
        try:
            print(environment(folder() / peer, needed[peer], base=base(peer)), flush=True)
        except (subprocess.CalledProcessError, MissingDependency) as error:
            print(f"{peer} was not installed: {error}", file=sys.stderr)
            failed.append(peer)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
