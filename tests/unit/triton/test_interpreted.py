"""The laws of the Triton kernels, run in Triton's interpreter.

In a process of their own, for Triton decides once, when it is imported, whether it interprets; torch imports it too.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.6,<3.7' (Linux)")
if not triton.__version__.startswith("3.6."):
    reason = f"interpreting.py mends the interpreter of Triton 3.6, and this is {triton.__version__}"
    pytest.skip(f"{reason}: pip install triton==3.6.0", allow_module_level=True)

HERE = Path(__file__).parent
LAWS = ["laws_layer.py", "laws_attention.py", "laws_rows.py"]  # the longest first


def run(laws, which):
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", which, str(HERE / laws)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.parametrize(("laws", "least"), list(zip(LAWS, (30, 50, 150), strict=True)))
def test_laws_hold_in_the_interpreter(laws, least):
    assert run(laws, "not slow") >= least


@pytest.mark.slow
@pytest.mark.parametrize("laws", LAWS[1:])
def test_laws_hold_over_whole_grids(laws):
    assert run(laws, "slow") >= 200
