"""Norm and gate of a training step: their laws in the interpreter, what they become on devices, what stays torch."""

import re
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.6,<3.7' (Linux)")
from test_compiled import assert_fits, compiled  # noqa: E402
from test_interpreted import run  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))
from tiny_gemma import far, prompts, tiny  # noqa: E402

from gemmakit.pytorch.kernels import training  # noqa: E402
from gemmakit.pytorch.kernels.triton import launch, rowwise  # noqa: E402
from gemmakit.pytorch.layers import GemmaRMSNorm  # noqa: E402

OPS = torch.ops.gemmakit
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU of compute capability 8.0 or more")


def test_laws_hold_in_the_interpreter():
    assert run("laws_training.py", "not slow") >= 180


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def widths(ptx):
    """Bytes of the loads and of the stores of device memory, without those of the one number a row."""
    found = re.findall(r"(ld|st)\.global\S*?\.(v\d\.)?b(\d+)\s", ptx)
    return [int(bits) // 8 * int((many or "v1.")[1]) for _, many, bits in found]


def check(kernel, constants, capability, element, tmp_path, singles=0, **numbers):
    pointers = {name: element for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {"scale_ptr": "*fp32", "sums_ptr": "*fp32"} if "scale_ptr" in pointers else {}
    found = compiled(kernel, constants, capability, pointers | numbers, set(numbers))
    assert_fits(found, capability, tmp_path)
    narrow = [w for w in widths(found.asm["ptx"]) if w != 16]
    assert narrow == [4] * singles, "a tensor is read or written in pieces of less than 16 bytes"
    assert len(widths(found.asm["ptx"])) > singles


def check_norm(D, capability, element, tmp_path):
    constants = launch.norm_constants(D)
    for residual in (False, True):
        check(rowwise.norm, constants | dict(RESIDUAL=residual), capability, element, tmp_path, singles=1)
    for wanted in (True, False):
        check(rowwise.norm_back, constants | dict(FOR_WEIGHT=wanted), capability, element, tmp_path, singles=1)


def check_gate(act, capability, element, tmp_path, n="i32"):
    constants = dict(ACT=act, BLOCK=launch.GATE_BLOCK, num_warps=launch.GATE_WARPS)
    for kernel in (rowwise.gated, rowwise.gated_back):
        check(kernel, constants, capability, element, tmp_path, n=n)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("D", [2048, 3072], ids=["2B", "7B"])
def test_the_norm_moves_16_bytes_at_a_time_and_does_not_spill(D, capability, tmp_path):
    check_norm(D, capability, "*bf16", tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_gate_moves_16_bytes_at_a_time_and_does_not_spill(capability, tmp_path):
    check_gate(0, capability, "*bf16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("element", ["*bf16", "*fp16", "*fp32"])
def test_every_dtype_size_and_activation(element, capability, tmp_path):
    for D in (1024, 2048, 3072, 4096, launch.MAX_DIM):
        check_norm(D, capability, element, tmp_path)
    for act in range(4):
        check_gate(act, capability, element, tmp_path, n="i64" if act % 2 else "i32")


def test_the_reader_of_widths_sees_a_narrow_one(tmp_path):
    """A number of elements that is no known multiple of 16 bounds each element by itself."""
    constants = dict(ACT=0, BLOCK=launch.GATE_BLOCK, num_warps=launch.GATE_WARPS)
    pointers = dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr"), "*bf16") | {"n": "i32"}
    found = compiled(rowwise.gated, constants, 90, pointers, set())
    assert set(widths(found.asm["ptx"])) == {2}


# -- without a GPU ------------------------------------------------------------------------------------------------


def test_on_the_cpu_the_modules_run_as_they_did():
    x, norm = torch.randn(2, 40, requires_grad=True), GemmaRMSNorm(40)
    assert not training.fuses(x)
    assert "RsqrtBackward" in names(norm(x).grad_fn)
    assert str(training.training_plan("cpu")) == "modules (Triton kernels: they are CUDA kernels, and this is cpu)"


def names(node):
    """Of all nodes of a gradient's graph."""
    return "" if node is None else node.name() + "".join(names(above) for above, _ in node.next_functions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_operators_are_plain_torch_where_no_kernel_runs(dtype):
    norm = GemmaRMSNorm(40).to(dtype)
    norm.weight.data = torch.randn(40).to(dtype)
    x, up = torch.randn(2, 3, 40).to(dtype).requires_grad_(), torch.randn(2, 3, 40).to(dtype)
    y, act = training.rms_norm(x, norm.weight, norm.eps), torch.nn.functional.silu
    assert torch.equal(y, norm(x))
    assert torch.equal(OPS.gated(x, up, 3), act(x) * up)
    for fused, plain in ((y, norm(x)), (OPS.gated(x, up, 3), act(x) * up)):
        (got,), (expected,) = (torch.autograd.grad(f, x, up) for f in (fused, plain))
        assert far(got, expected) < 2 * max(torch.finfo(dtype).eps, 2**-22)


def test_torch_finds_nothing_wrong_with_the_operators():
    x, weight = torch.randn(2, 3, 20, requires_grad=True), torch.randn(20, requires_grad=True)
    torch.library.opcheck(OPS.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(OPS.gated.default, (x, torch.randn(2, 3, 20, requires_grad=True), 1))
    scale, plain = torch.ones(2, 3), x.detach()
    torch.library.opcheck(OPS.rms_norm_back.default, (plain, plain, weight.detach(), scale, False))
    torch.library.opcheck(OPS.gated_back.default, (plain, plain, plain, 2))


def trained(model, call, steps=2):
    optimizer, losses, ids = torch.optim.SGD(model.parameters(), lr=0.05), [], prompts(2, 9).to(model.device)
    for _ in range(steps):
        loss = call(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_trains_like_the_model(checkpointing):
    """Through the compiler's own split into forward and backward graphs."""
    torch._dynamo.reset()
    model, same = tiny().train(), tiny().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    losses = trained(model, torch.compile(model, backend="aot_eager"))
    torch._dynamo.reset()
    assert far(losses, trained(same, same)) < 1e-5


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_a_model_trains_alike(monkeypatch, dtype):
    """bfloat16: roundings of 2^-8 that fall the other way pass through two layers."""
    fused = tiny(hidden_size=96).to("cuda", dtype).train()
    assert "rms_norm" in names(fused.model.norm(torch.ones(1, 1, 96, device="cuda", dtype=dtype)).grad_fn)
    losses = trained(fused, fused)
    monkeypatch.setattr(training, "DEVICES", set())
    plain = tiny(hidden_size=96).to("cuda", dtype).train()
    assert far(losses, trained(plain, plain)) < (2e-4 if dtype == torch.float32 else 2e-2)


@CUDA
@pytest.mark.parametrize("act", range(4))
def test_on_a_gpu_the_kernels_equal_their_plain_forms(act, monkeypatch):
    x, up, dy = torch.randn(3, 700, 3072, device="cuda").bfloat16()
    weight = torch.randn(3072, device="cuda").bfloat16()
    _, scale = OPS.rms_norm(x, weight, 1e-6)

    def every():
        norms = (*OPS.rms_norm(x, weight, 1e-6), *OPS.rms_norm_back(dy, x, weight, scale, True))
        return (*norms, OPS.gated(x, up, act), *OPS.gated_back(dy, x, up, act))

    found, again = every(), every()
    monkeypatch.setattr(training, "DEVICES", set())
    for got, same, expected in zip(found, again, every(), strict=True):
        assert torch.equal(got, same)
        assert far(got, expected) < 2**-7
