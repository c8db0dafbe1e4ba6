"""Compiles the CPU kernels when the package is installed; without a compiler it installs all the same."""

import contextlib
import hashlib
import os
import platform
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("gemmakit/native")
LIBRARY = FOLDER / "native.so"
COMPILER = os.environ.get("CXX", "c++")
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Best first: the library takes the first that the processor at hand runs.
INSTRUCTION_SETS = {
    "x86_64": {
        "amx": [*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        "avx512bf16": [*_AVX512, "-mavx512vnni", "-mavx512bf16"],
        "avx512vnni": [*_AVX512, "-mavx512vnni"],
        "avx512": _AVX512,
        "avxvnni": [*_AVX2, "-mavxvnni"],
        "avx2": _AVX2,
    },
    "aarch64": {"neondot": ["-march=armv8.2-a+dotprod"], "neon": []},
}
INSTRUCTION_SETS["AMD64"] = INSTRUCTION_SETS["x86_64"]
INSTRUCTION_SETS["arm64"] = INSTRUCTION_SETS["aarch64"]
# How a system's compiler is told of OpenMP, when compiling and when linking. Apple's knows it but has no library of it:
# torch brings one, which the kernels find when they are loaded.
OPENMP = {
    "Darwin": (["-Xclang", "-fopenmp"], ["-Wl,-undefined,dynamic_lookup"]),
    "Linux": (["-fopenmp"], ["-fopenmp"]),
}


class NativeKernels(BuildHookInterface):
    """Leaves native.so beside its sources, for the wheel and for an editable install alike."""

    def initialize(self, version: str, build_data: dict) -> None:
        if self.target_name != "wheel":
            return
        if not is_made(Path(self.root)) and not compile_library(Path(self.root)):
            self.app.display_warning("gemmakit: no CPU kernels were compiled; torch's own are used, which are slower.")
            return
        build_data["artifacts"].append(LIBRARY.as_posix())
        build_data["pure_python"] = False
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"  # loaded through ctypes, so it fits every Python


def is_made(root: Path) -> bool:
    """Whether compiling would give the library that is there: of two installs in a row only the first compiles."""
    target = root / LIBRARY
    with contextlib.suppress(OSError):  # there is no library, or no compiler
        return recipe(COMPILER, platform.machine(), root / FOLDER).encode() in target.read_bytes()
    return False


def recipe(compiler: str, machine: str, source: Path) -> str:
    """A digest of all that a library comes from: the sources, this file, the sets it compiles, and the compiler."""
    said = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    how = (sources_of(source), INSTRUCTION_SETS.get(machine), Path(__file__).read_bytes(), compiler, said)
    return hashlib.sha256(repr(how).encode()).hexdigest()


def sources_of(folder: Path) -> str:
    """The digest that loading compares."""
    return runpy.run_path(str(folder / "sources.py"))["digest"](folder)


def compile_library(root: Path) -> bool:
    """Compile what the compiler can; whether a library came out. Whoever has the old one loaded keeps it."""
    target, compiler = root / LIBRARY, COMPILER
    _, linking = OPENMP.get(platform.system(), OPENMP["Linux"])
    with tempfile.TemporaryDirectory() as scratch:
        staged = target.with_suffix(f".{os.getpid()}.tmp")
        objects = compile_objects(compiler, platform.machine(), root / FOLDER, Path(scratch))
        done = bool(objects) and run(compiler, "-shared", *linking, *objects, "-o", staged)
    if done:
        os.replace(staged, target)
    else:
        target.unlink(missing_ok=True)  # one that no longer fits its sources
    return done


def compile_objects(compiler: str, machine: str, source: Path, scratch: Path) -> list[Path]:
    """The object files of all instruction sets of a machine that the compiler knows, and of what picks one; or none."""
    once = [source / "dispatch.cpp", source / "xla.cpp"]
    (scratch / "ids.h").write_text(ids_header(source / "ids.py"))
    kernels = sorted(set(source.glob("*.cpp")) - set(once))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Set -> its object files, all compiled at the same time.
        jobs = {
            isa: [pool.submit(compile_one, compiler, scratch, file, isa, flags) for file in kernels]
            for isa, flags in INSTRUCTION_SETS.get(machine, {}).items()
        }
        made = {isa: [job.result() for job in compiled] for isa, compiled in jobs.items()}
    objects = {isa: [file for file in files if file] for isa, files in made.items() if all(files)}
    isas = "-DGEMMAKIT_ISAS(DO)=" + " ".join(f"DO({isa})" for isa in objects)
    if not objects:
        return []
    named = [f'-DGEMMAKIT_SOURCES="{sources_of(source)}"', f'-DGEMMAKIT_RECIPE="{recipe(compiler, machine, source)}"']
    compiling, _ = OPENMP.get(platform.system(), OPENMP["Linux"])
    about = ["-c", *compiling, isas, *named, "-I", scratch]
    chosen = [scratch / f"{file.stem}.o" for file in once]
    if not all(run(compiler, *about, file, "-o", made) for file, made in zip(once, chosen, strict=True)):
        return []
    return [*(file for files in objects.values() for file in files), *chosen]


def compile_one(compiler: str, scratch: Path, file: Path, isa: str, flags: list[str]) -> Path | None:
    compiling, _ = OPENMP.get(platform.system(), OPENMP["Linux"])
    made = scratch / f"{file.stem}.{isa}.o"
    done = run(compiler, "-c", *compiling, *flags, f"-DISA={isa}", "-I", scratch, file, "-o", made)
    return made if done else None


def ids_header(ids: Path) -> str:
    """The numbers of weight formats and activations as C++ enumerations."""
    numbered = runpy.run_path(str(ids))
    enums = (numbered["WeightFormat"], numbered["Activation"])
    bodies = (", ".join(f"{one.name} = {one.value}" for one in enum) for enum in enums)
    lines = [f"enum {enum.__name__} : int32_t {{ {body} }};" for enum, body in zip(enums, bodies, strict=True)]
    return "\n".join(["#pragma once", "#include <cstdint>", *lines, ""])


def run(compiler: str, *arguments: object) -> bool:
    # Products and sums are fused only where the source says so: elsewhere torch rounds in between.
    command = [compiler, "-O3", "-ffp-contract=off", "-std=c++17", "-fPIC", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        print(f"{compiler}: {error}", file=sys.stderr)
        return False
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode == 0
