"""The kernels' NEON forms: cross-compiled as they are for an aarch64 machine, and run by its emulator.

The tests are those of this folder, whose library is then the emulated one (emulated_library.py).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# A processor with products of bytes and one without.
PROCESSORS = {"neondot": "max", "neon": "cortex-a72"}
TESTS = ["test_native_linear.py", "test_packed_linear.py", "test_multiply.py", "test_panels.py", "test_seams.py",
         "test_accuracy_step.py", "test_attend_pages.py", "test_batch_invariant.py",
         "test_seams_of_the_family.py"]  # fmt: skip
# They start another process, or look at how the library of this machine is loaded.
NOT_HERE = "asked_for or switched_off or without_the_library or library_of_other_sources"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR} (Debian's g++-aarch64-linux-gnu and qemu-user)",
    ),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    sys.path.insert(0, str(ROOT))
    import hatch_build

    source, scratch = ROOT / hatch_build.FOLDER, tmp_path_factory.mktemp("neon")
    objects = hatch_build.compile_objects(COMPILER, "aarch64", source, scratch)
    made = scratch / "driver"
    # Static, so that the emulator needs no libraries of that machine.
    assert hatch_build.run(
        COMPILER, "-fopenmp", "-static", "-I", source, "-I", scratch, HERE / "neon_driver.cpp", *objects, "-o", made
    )
    return made


@pytest.mark.parametrize("isa", PROCESSORS)
def test_the_best_set_that_a_processor_runs_is_taken(driver, isa):
    said = subprocess.run([EMULATOR, "-cpu", PROCESSORS[isa], driver], input=b"", capture_output=True, check=True)
    assert said.stdout.decode().strip() == isa


@pytest.mark.parametrize("tests", TESTS)
def test_every_law_of_the_kernels_holds(driver, tests):
    emulated = {"EMULATED": f"{EMULATOR} -cpu {PROCESSORS['neondot']} {driver}", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "emulated_library"]
    chosen = ["-m", "not slow", "-k", f"not ({NOT_HERE})", str(HERE / tests)]
    done = subprocess.run(
        [*command, *chosen], cwd=ROOT, env=os.environ | emulated, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
