"""Run tests with each instruction set of the CPU kernels, those that this processor lacks emulated by AVX2.

    python scripts/every_isa.py [--isa avxvnni ...] [--here] [--repeat N] [-- pytest arguments]

Each set is compiled alone into a copy of the tree, where the tests then run with GEMMAKIT_ISA naming it. `--here`
leaves out what would be emulated: tests/emulated/immintrin.h has each instruction's result, not its speed. `--repeat`
runs the tests again with another seed each time. Copies are in a temporary folder, or in `--keep FOLDER`, where the
libraries are taken up again while their sources are the same. For x86-64; test_neon_under_qemu.py is for aarch64.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE = Path("gemmakit/native")
SETS = ("avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx")
TESTS = ["tests/unit/kernels", "tests/unit/quantize", "tests/unit/pytorch", "tests/unit/decode",
         "tests/parity/test_forward_matches_transformers.py"]  # fmt: skip


def sources() -> list[Path]:
    """What the library is made from."""
    found = [*(ROOT / NATIVE).glob("*.cpp"), *(ROOT / NATIVE).glob("*.h")]
    found += [ROOT / NATIVE / "ids.py", ROOT / "hatch_build.py", ROOT / "tests/emulated/immintrin.h"]
    return sorted(path for path in found if path.exists())


def build_module(root: Path):
    """hatch_build.py of a tree, without hatchling where it is not installed."""
    sys.modules.pop("hatch_build", None)
    if importlib.util.find_spec("hatchling") is None:
        name = "hatchling.builders.hooks.plugin.interface"
        module = sys.modules[name] = types.ModuleType(name)
        module.BuildHookInterface = object
    spec = importlib.util.spec_from_file_location("hatch_build", root / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs_here(isa: str) -> bool:
    """Whether the processor has it; where the installed library has none of it, neither do we."""
    code = "from gemmakit import native; import sys; sys.exit(native.library() is None)"
    environment = os.environ | {"GEMMAKIT_ISA": isa, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0


def copy(to: Path) -> None:
    """The tree as it stands here, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        with contextlib.suppress(FileNotFoundError):  # deleted, not yet committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def compile_one(tree: Path, isa: str, emulated: bool) -> None:
    """native.so of this set alone, in the tree."""
    build = build_module(tree)
    flags = build.INSTRUCTION_SETS["x86_64"][isa]
    if emulated:
        # -O1: thousands of emulated instructions take minutes to optimize, and no law asks for speed.
        flags = [*build.INSTRUCTION_SETS["x86_64"]["avx2"], "-O1", f"-DEMULATED_{isa.upper()}",
                 f"-I{tree / 'tests/emulated'}"]  # fmt: skip
        plain = build.run
        # What the dispatcher asks this processor and its system for, it is told that it has.
        told = "-D__builtin_cpu_supports(name)=1", "-DHAS_TILES=true"
        build.run = lambda compiler, *rest: plain(compiler, *told, *rest)
    build.INSTRUCTION_SETS["x86_64"] = {isa: flags}
    if not build.compile_library(tree):
        raise SystemExit(f"the kernels did not compile for {isa}")


def library(tree: Path, isa: str, emulated: bool, kept: Path) -> None:
    """The same, taken from `kept` where it was compiled before."""
    text = isa.encode() + b"".join(path.read_bytes() for path in sources())
    stored = kept / f"{isa}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    made = tree / NATIVE / "native.so"
    if not stored.exists():
        compile_one(tree, isa, emulated)
        shutil.copy2(made, stored)
    shutil.copy2(stored, made)


def run_tests(tree: Path, isa: str, arguments: list[str], seed: int) -> bool:
    environment = os.environ | {
        "GEMMAKIT_ISA": isa, "GEMMAKIT_TEST_SEED": str(seed),
        "PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "tests", tree / "scripts"))),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--here", action="store_true", help="only what this processor has")
    parser.add_argument("--repeat", type=int, default=1, help="how often, each time with another seed")
    parser.add_argument("--keep", type=Path, help="folder for the copies and the compiled libraries")
    parser.add_argument("pytest", nargs="*", help="after --: what pytest is told instead of the kernels' tests")
    asked = parser.parse_args()
    failed = []
    with contextlib.ExitStack() as stack:
        kept = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for isa in asked.isa:
            emulated = not runs_here(isa)
            if emulated and asked.here:
                continue
            tree = kept.resolve() / isa
            shutil.rmtree(tree, ignore_errors=True)
            copy(tree)
            library(tree, isa, emulated, kept)
            for seed in range(asked.repeat):
                print(f"== {isa}{' (emulated)' if emulated else ''}, seed {seed}", flush=True)
                if not run_tests(tree, isa, asked.pytest or TESTS, seed):
                    failed.append(f"{isa}, seed {seed}")
    print("\n".join(f"FAILED {one}" for one in failed) or "every instruction set passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
