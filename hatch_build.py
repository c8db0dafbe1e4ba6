"""Compiles the CPU kernels when the package is installed; without a compiler it installs all the same."""

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("gemmakit/pytorch/kernels/cpu")
LIBRARY = FOLDER / "native.so"
# Best first: the library takes the first that the processor at hand runs.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx512bf16": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx2", "-mfma", "-mf16c"],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
    },
    "aarch64": {"neon": []},
}
INSTRUCTION_SETS["AMD64"] = INSTRUCTION_SETS["x86_64"]
INSTRUCTION_SETS["arm64"] = INSTRUCTION_SETS["aarch64"]


class NativeKernels(BuildHookInterface):
    """Leaves native.so beside its sources, for the wheel and for an editable install alike."""

    def initialize(self, version: str, build_data: dict) -> None:
        if self.target_name != "wheel":
            return
        if not compile_library(Path(self.root)):
            self.app.display_warning("gemmakit: no CPU kernels were compiled; torch's own are used, which are slower.")
            return
        build_data["artifacts"].append(LIBRARY.as_posix())
        build_data["pure_python"] = False
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"  # loaded through ctypes, so it fits every Python


def compile_library(root: Path) -> bool:
    """Compile what the compiler can; whether a library came out."""
    source, target = root / FOLDER, root / LIBRARY
    target.unlink(missing_ok=True)
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as scratch:
        objects = []
        names = []
        for name, flags in INSTRUCTION_SETS.get(platform.machine(), {}).items():
            made = Path(scratch) / f"{name}.o"
            if run(compiler, "-c", *flags, f"-DISA={name}", source / "rows.cpp", "-o", made):
                objects.append(made)
                names.append(name)
        if not objects:
            return False
        made = Path(scratch) / "dispatch.o"
        isas = "-DGEMMAKIT_ISAS(DO)=" + " ".join(f"DO({name})" for name in names)
        staged = Path(scratch) / "native.so"
        done = run(compiler, "-c", isas, source / "dispatch.cpp", "-o", made)
        done = done and run(compiler, "-shared", *objects, made, "-o", staged)
        if done:
            target.write_bytes(staged.read_bytes())
        return done


def run(compiler: str, *arguments: object) -> bool:
    command = [compiler, "-O3", "-std=c++17", "-fPIC", "-fopenmp", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        print(f"{compiler}: {error}", file=sys.stderr)
        return False
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode == 0
