"""No number that changes from step to step makes another kernel: it would be compiled in the middle of decoding.

Triton makes a kernel anew where an argument becomes 1, or a multiple of 16, or ceases to be; what it looks at is read
here for what `launch` passes, as for a device of 9.0, without one.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.6,<3.7' (Linux)")
if not triton.__version__.startswith("3.6."):
    reason = f"it reads what Triton 3.6 looks at, and this is {triton.__version__}"
    pytest.skip(f"{reason}: pip install triton==3.6.0", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not specialized: unset TRITON_INTERPRET", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from gemmakit.native.ids import Activation  # noqa: E402
from gemmakit.pytorch.kernels.triton import attention, gemv, launch, tuning  # noqa: E402

H = 64


class Reader:
    """In a kernel's place: notes by what Triton would choose the compiled form."""

    def __init__(self, kernel, seen):
        backend = CUDABackend(GPUTarget("cuda", 90, 32))
        self.name, self.seen = kernel.fn.__name__, seen
        self.look = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid):
        def start(*arguments, **named):
            _, kinds, options = self.look(*arguments, **named)
            self.seen.append((self.name, str(kinds), str(sorted(options.items()))))

        return start


@pytest.fixture
def seen(monkeypatch):
    found = []
    for module, name in ((attention, "attend"), (attention, "join"), (gemv, "project"), (gemv, "gate_up")):
        monkeypatch.setattr(module, name, Reader(getattr(module, name), found))
    monkeypatch.setattr(launch, "constants", lambda device: tuning.HOPPER)
    return found


def attend(held, capacity, placed=False, masked=False, rows=2, window=None):
    q, k, v = (torch.zeros(rows, 1, n * H, dtype=torch.bfloat16) for n in (4, 1, 1))
    keys, values = torch.zeros(2, rows, 1, capacity, H, dtype=torch.bfloat16)
    tables = (torch.zeros(1, 1, 1, H, dtype=torch.bfloat16),) * 2
    where = (0, torch.tensor([held])) if placed else (held, None)
    room = launch.Room(keys, values, *where, most=capacity if placed else capacity - 1)
    last = None if window is None or held < window else window
    mask = torch.ones(rows, 1, 1, last or held + 1, dtype=torch.bool) if masked else None
    blind = torch.zeros(rows, 1, 1, 1, dtype=torch.bool) if masked else None
    launch.attend(q, k, v, tables, room, H, 1.0, mask=mask, blind=blind, last=last)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_the_length_of_the_context_makes_no_kernel(placed, masked, window, seen):
    for held in (0, 1, 2, 15, 16, 17, 32, 160, 2047):
        attend(held, 2048, placed, masked, window=window)
    assert {name for name, *_ in seen} == {"attend", "join"}
    assert len(set(seen)) == 2


def test_the_reader_sees_what_makes_one(seen):
    attend(5, 2048)
    attend(5, 2048, rows=16)  # among fewer programs
    attend(5, 2048, placed=True)
    assert len(set(seen)) == 6


def test_the_number_of_rows_makes_one_kernel_a_power_of_two(seen):
    norm = launch.Norm(torch.zeros(256, dtype=torch.bfloat16), 1e-6)
    weights = [launch.operand(torch.zeros(O, 256, dtype=torch.bfloat16)) for O in (64, 32, 32)]
    for rows in range(1, 17):
        x = torch.zeros(rows, 256, dtype=torch.bfloat16)
        launch.project(x, weights, [None] * 3, norm)
        if rows <= launch.MAX_ROWS:
            launch.gate_up(x, norm, *weights[1:], (None, None), Activation.GELU_TANH)
    assert len({found for found in seen if found[0] == "project"}) == 4
    assert len({found for found in seen if found[0] == "gate_up"}) == 4
