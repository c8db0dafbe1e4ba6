"""Where the Triton kernels are not to be had, that is said in words and the modules run."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from gemmakit.pytorch.kernels import triton as kernels

# Whether Triton is there, or not installed, or (as None in sys.modules) hidden.
HIDDEN = "import sys; sys.modules['triton'] = None; "
FUSED = "from gemmakit.pytorch.fused import cuda; from gemmakit.pytorch.kernels.triton import decision; "


def python(code):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_the_fused_layer_imports_without_triton():
    done = python(HIDDEN + FUSED + "print(decision())")
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout


def test_importing_the_fused_layer_imports_no_kernel():
    done = python("import sys; " + FUSED + "print([m for m in sys.modules if m.endswith('.gemv') or m == 'triton'])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="says what happens without a GPU: hide it with CUDA_VISIBLE_DEVICES="
)
def test_without_a_gpu_the_reason_is_given():
    pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.6,<3.7' (Linux)")
    assert not kernels.available(torch.device("cuda"))
    assert kernels.decision(torch.device("cuda")).why == "Triton kernels: PyTorch sees no CUDA device"
    assert "this is cpu" in kernels.decision(torch.device("cpu")).why


CPU = torch.device("cpu")


def test_a_kernel_that_does_not_start_is_told_once_and_no_other_is_asked_for(monkeypatch):
    monkeypatch.setattr(kernels, "_refused", {})

    def start():
        with pytest.raises(kernels.Refused), kernels.starting(CPU):
            raise ValueError("no compiler\nand more")

    with pytest.warns(UserWarning, match="not used on cpu: one did not start .ValueError: no compiler"):
        start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start()
    assert kernels.decision(CPU).why == "Triton kernels: one did not start (ValueError: no compiler)"


def test_too_little_memory_says_nothing_about_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "_refused", {})
    with pytest.raises(torch.OutOfMemoryError), kernels.starting(CPU):
        raise torch.OutOfMemoryError("no memory")
    assert not kernels._refused
