"""Compiles the CPU kernels when the package is installed; without a compiler it installs all the same."""

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("gemmakit/pytorch/kernels/cpu")
LIBRARY = FOLDER / "native.so"
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Best first: the library takes the first that the processor at hand runs.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx512bf16": [*_AVX512, "-mavx512vnni", "-mavx512bf16"],
        "avx512vnni": [*_AVX512, "-mavx512vnni"],
        "avx512": _AVX512,
        "avxvnni": [*_AVX2, "-mavxvnni"],
        "avx2": _AVX2,
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
    """Compile what the compiler can; whether a library came out. Whoever has the old one loaded keeps it."""
    source, target = root / FOLDER, root / LIBRARY
    compiler = os.environ.get("CXX", "c++")
    dispatch = source / "dispatch.cpp"
    kernels = sorted(set(source.glob("*.cpp")) - {dispatch})
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        # Set -> its object files, all compiled at the same time; a set that the compiler does not know is left out.
        jobs = {
            isa: [pool.submit(compile_one, compiler, Path(scratch), file, isa, flags) for file in kernels]
            for isa, flags in INSTRUCTION_SETS.get(platform.machine(), {}).items()
        }
        made = {isa: [job.result() for job in compiled] for isa, compiled in jobs.items()}
        objects = {isa: list(filter(None, files)) for isa, files in made.items() if all(files)}
        staged = target.with_suffix(f".{os.getpid()}.tmp")
        done = bool(objects) and link(compiler, Path(scratch), dispatch, objects, staged)
    if done:
        os.replace(staged, target)
    else:
        target.unlink(missing_ok=True)  # one that no longer fits its sources
    return done


def compile_one(compiler: str, scratch: Path, file: Path, isa: str, flags: list[str]) -> Path | None:
    made = scratch / f"{file.stem}.{isa}.o"
    return made if run(compiler, "-c", *flags, f"-DISA={isa}", file, "-o", made) else None


def link(compiler: str, scratch: Path, dispatch: Path, objects: dict[str, list[Path]], staged: Path) -> bool:
    isas = "-DGEMMAKIT_ISAS(DO)=" + " ".join(f"DO({isa})" for isa in objects)
    made = scratch / "dispatch.o"
    if not run(compiler, "-c", isas, dispatch, "-o", made):
        return False
    return run(compiler, "-shared", *(file for files in objects.values() for file in files), made, "-o", staged)


def run(compiler: str, *arguments: object) -> bool:
    # Products and sums are fused only where the source says so: elsewhere torch rounds in between.
    command = [compiler, "-O3", "-ffp-contract=off", "-std=c++17", "-fPIC", "-fopenmp", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        print(f"{compiler}: {error}", file=sys.stderr)
        return False
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode == 0
