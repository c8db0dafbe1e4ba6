"""The fused norm and gate of a training step equal the modules, forward and back. Run by test_training.py, interpreted.

Gradients are compared with float64 autograd of the formulas, at the same rounded inputs. What is allowed: one rounding
to the dtype, and float32 sums in another order (2^-20 of the sum of magnitudes).
"""

import sys
from pathlib import Path

import interpreting  # noqa: F401  before triton
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))
import tiny_gemma
from tiny_gemma import far, prompts

from gemmakit.config import ACTIVATIONS
from gemmakit.native.ids import Activation
from gemmakit.pytorch.kernels import reference, training, triton
from gemmakit.pytorch.kernels.triton import launch, rowwise
from gemmakit.pytorch.layers import GemmaMLP, GemmaRMSNorm, activation

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 20), (2, 3, 96), (5, 300), (2, 2048), (1, 3072), (2, 3001)]
EPS = 1e-6
OPS = torch.ops.gemmakit


def random(*shape, dtype, seed=1, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def spacing(values, dtype):
    """The distance of neighbours of the dtype at float64 values."""
    _, exponent = torch.frexp(values.abs().clamp_min(torch.finfo(dtype).tiny))
    return torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps / 2), exponent)


def assert_close(got, exact, size, roundings=0.5):
    """got: rounded to its dtype `roundings` times half a step, around sums whose terms have magnitudes of `size`."""
    assert got.shape == exact.shape
    allowed = 2 * roundings * spacing(exact, got.dtype) + 2**-20 * size
    difference = (got.double() - exact).abs()
    assert (difference <= allowed).all(), float((difference / allowed).max())


def tiny_mlp():
    config = tiny_gemma.tiny_config()
    return GemmaMLP(config, config.layer(0))


@pytest.fixture
def forced(monkeypatch):
    """The operators in the modules' place, on the CPU; what of them was called comes in a list."""
    monkeypatch.setattr(training, "DEVICES", {"cpu", "cuda"})
    called = []

    def counted(run):
        def call(*arguments):
            called.append(run.__name__)
            return run(*arguments)

        return call

    for run in (launch.rms_norm_saving, launch.rms_norm_back, launch.gated, launch.gated_back):
        monkeypatch.setattr(launch, run.__name__, counted(run))
    return called


# -- the norm -----------------------------------------------------------------------------------------------------


def exact_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (1 + weight)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["same", "float32 weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_is_the_modules(shape, dtype, weight_dtype):
    """In float32 up to the order of one sum; in half formats a value near a tie may fall to its neighbour."""
    module = GemmaRMSNorm(shape[-1], EPS)
    module.weight.data = random(shape[-1], dtype=weight_dtype or dtype, seed=2, scale=0.3)
    x = random(*shape, dtype=dtype, scale=3.0)
    y, scale = launch.rms_norm_saving(x, module.weight.detach(), EPS)
    expected = module(x).detach().double()
    assert y.dtype == dtype
    assert scale.shape == x.shape[:-1]
    allowed = 2**-21 * expected.abs() if dtype == torch.float32 else spacing(expected, dtype)
    assert ((y.double() - expected).abs() <= allowed).all()
    if dtype != torch.float32:
        assert (y == expected).float().mean() > 0.99


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["same", "float32 weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_norm_are_those_of_float64(shape, dtype, weight_dtype):
    D = shape[-1]
    x, dy = random(*shape, dtype=dtype, scale=3.0), random(*shape, dtype=dtype, seed=3)
    weight = random(D, dtype=weight_dtype or dtype, seed=2, scale=0.3)
    _, scale = launch.rms_norm_saving(x, weight, EPS)
    for_x, for_weight = launch.rms_norm_back(dy, x, weight, scale, True)
    X, W = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.autograd.grad(exact_norm(X, W), (X, W), dy.double())
    n, g = exact_norm(X.detach(), torch.zeros(1)).abs(), (dy.double() * (1 + W.detach())).abs()
    assert for_weight.dtype == weight.dtype
    assert_close(for_x, exact[0], scale.double()[..., None] * (g + n * (g * n).mean(-1, keepdim=True)))
    assert_close(for_weight, exact[1], (dy.double() * n).abs().reshape(-1, D).sum(0))
    plain = reference.rms_norm_back(dy, x, weight, scale)
    for got, other in zip((for_x, for_weight), plain, strict=True):
        assert far(got, other) < (1e-6 if got.dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("programs", [1, 3, 4])
def test_programs_that_take_several_rows_sum_them_all(monkeypatch, programs):
    x, dy, weight = (random(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate([(11, 40), (11, 40), (40,)]))
    _, scale = launch.rms_norm_saving(x, weight, EPS)
    expected = launch.rms_norm_back(dy, x, weight, scale, True)
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    for_x, for_weight = launch.rms_norm_back(dy, x, weight, scale, True)
    assert torch.equal(for_x, expected[0])
    assert far(for_weight, expected[1]) < 1e-6


def test_a_frozen_weight_costs_nothing(monkeypatch):
    x, dy, weight = random(3, 40, dtype=torch.float32), random(3, 40, dtype=torch.float32, seed=2), torch.ones(40)
    _, scale = launch.rms_norm_saving(x, weight, EPS)
    for_x, none = launch.rms_norm_back(dy, x, weight, scale, False)
    assert none.shape == (0,)
    assert torch.equal(for_x, launch.rms_norm_back(dy, x, weight, scale, True)[0])


def test_rows_longer_than_a_program_holds_go_through_torch(monkeypatch):
    x, weight = random(3, 40, dtype=torch.float32), torch.ones(40)
    y, scale = launch.rms_norm_saving(x, weight, EPS)
    back = launch.rms_norm_back(x, x, weight, scale, True)
    monkeypatch.setattr(launch, "MAX_DIM", 39)
    monkeypatch.setattr(launch, "_start", None)
    assert far(launch.rms_norm_saving(x, weight, EPS)[0], y) < 1e-6
    assert far(launch.rms_norm_back(x, x, weight, scale, True)[0], back[0]) < 1e-6


def test_rows_with_gaps_are_read_where_they_lie():
    x = random(40, 6, dtype=torch.float32)
    y, scale = launch.rms_norm_saving(x.T, torch.ones(40), EPS)
    assert torch.equal(y, launch.rms_norm_saving(x.T.contiguous(), torch.ones(40), EPS)[0])
    whole = launch.rms_norm_back(x.T.contiguous(), x.T.contiguous(), torch.ones(40), scale, True)
    for got, expected in zip(launch.rms_norm_back(x.T, x.T, torch.ones(40), scale, True), whole, strict=True):
        assert torch.equal(got, expected)


def test_a_row_of_zeros_and_no_rows():
    y, scale = launch.rms_norm_saving(torch.zeros(1, 40), torch.ones(40), EPS)
    for_x, _ = launch.rms_norm_back(torch.ones(1, 40), torch.zeros(1, 40), torch.ones(40), scale, True)
    assert not y.any()
    assert for_x.isfinite().all()
    y, scale = launch.rms_norm_saving(torch.zeros(0, 40), torch.ones(40), EPS)
    for_x, for_weight = launch.rms_norm_back(y, y, torch.ones(40), scale, True)
    assert y.shape == for_x.shape == (0, 40)
    assert torch.equal(for_weight, torch.zeros(40))


# -- the gate -----------------------------------------------------------------------------------------------------


def test_every_activation_of_a_configuration_has_the_kernels_number():
    assert [reference.ACTIVATION_OF[activation(name)] for name in ACTIVATIONS] == list(Activation)


@pytest.mark.parametrize("act", list(Activation), ids=ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (2, 3, 700), (1, 2048), (2, 3001)], ids=str)
def test_gate_and_its_gradients_are_right(shape, dtype, act):
    """The activation is rounded and the product: each may fall to a neighbour. Torch's tanh is itself 2^-23 off 1."""
    gate, up, dy = (random(*shape, dtype=dtype, seed=i, scale=3.0) for i in range(3))
    y, (for_gate, for_up) = launch.gated(gate, up, act), launch.gated_back(dy, gate, up, act)
    expected = reference.gated(gate, up, act).double()
    size = (gate.double() * up.double()).abs()
    assert_close(y, expected, size, roundings=2 if dtype != torch.float32 else 4)
    if dtype != torch.float32:  # with one rounding instead of two, or in another place, many would differ
        near = gate > -4  # below, 1 + erf and 1 + tanh keep few digits
        act_once = reference.ACTIVATIONS[act](gate.double()).to(dtype)
        assert (y == act_once * up)[near].float().mean() > 0.99
        assert (for_up == (dy.double() * act_once.double()).to(dtype))[near].float().mean() > 0.99
    G, U = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = torch.autograd.grad(reference.ACTIVATIONS[act](G) * U, (G, U), dy.double())
    # No activation of |g| < 15 bends so that its slope's terms exceed 1 + |g|.
    assert_close(for_gate, exact[0], (dy.double() * up.double()).abs() * (1 + gate.double().abs()))
    assert_close(for_up, exact[1], (dy.double() * gate.double()).abs(), roundings=1)
    for got, other in zip((for_gate, for_up), reference.gated_back(dy, gate, up, act), strict=True):
        assert far(got, other) < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("act", list(Activation), ids=ACTIVATIONS)
def test_far_gates_have_finite_slopes(act):
    gate = torch.tensor([-3e38, -1e20, -1e4, -80.0, -20.5, -0.0, 0.0, 20.5, 80.0, 1e4, 1e20, 3e38])
    y, (slopes, value) = (
        launch.gated(gate, torch.ones(12), act),
        launch.gated_back(torch.ones(12), gate, torch.ones(12), act),
    )
    assert torch.equal(y, value)
    assert torch.equal(y[7:], gate[7:])
    assert y[:5].abs().max() < 1e-6
    limits = torch.tensor([0.0] * 5 + [0.5 * (act != Activation.RELU)] * 2 + [1.0] * 5)
    assert torch.allclose(slopes, limits, atol=1e-6)


@pytest.mark.parametrize("act", list(Activation), ids=ACTIVATIONS)
def test_what_is_not_a_number_stays_so(act):
    gate, ones = torch.full((3,), torch.nan), torch.ones(3)
    assert launch.gated(gate, ones, act).isnan().all()
    assert launch.gated(ones, gate, act).isnan().all()
    assert launch.gated_back(gate, ones, ones, act)[0].isnan().all()
    assert launch.gated_back(ones, gate, ones, act)[1].isnan().all()


def test_an_empty_gate():
    assert launch.gated(torch.zeros(0, 5), torch.zeros(0, 5), 0).shape == (0, 5)
    assert [t.shape for t in launch.gated_back(*[torch.zeros(0, 5)] * 3, 0)] == [(0, 5)] * 2


# -- the operators ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_finds_nothing_wrong_with_the_operators(forced, dtype):
    x, weight = random(2, 3, 20, dtype=dtype).requires_grad_(), random(20, dtype=dtype, seed=2).requires_grad_()
    _, scale = OPS.rms_norm(x.detach(), weight.detach(), EPS)
    torch.library.opcheck(OPS.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(OPS.rms_norm.default, (x, weight.detach(), EPS))
    torch.library.opcheck(OPS.gated.default, (x, random(2, 3, 20, dtype=dtype, seed=3).requires_grad_(), 0))
    for wanted in (True, False):
        torch.library.opcheck(OPS.rms_norm_back.default, (x.detach(), x.detach(), weight.detach(), scale, wanted))
    torch.library.opcheck(OPS.gated_back.default, (x.detach(), x.detach(), x.detach(), 3))
    assert set(forced) == {"rms_norm_saving", "rms_norm_back", "gated", "gated_back"}


def directional(f, x, v, h=1e-2):
    return (f(x + h * v).double() - f(x - h * v).double()).sum() / (2 * h)


@pytest.mark.parametrize("act", list(Activation), ids=ACTIVATIONS)
def test_gradients_are_what_differences_say(forced, act):
    """Central differences in float32: about 1e-3 of the size of what is summed, away from the bend of ReLU."""
    x, v, weight, up = (random(4, 33, dtype=torch.float32, seed=i) for i in range(4))
    x = x + 0.05 * x.sign()
    for f in (lambda x: training.rms_norm(x, weight[0], EPS) * up, lambda x: training.gated(x, up, act)):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(x).sum(), x)
        with torch.no_grad():
            difference = directional(f, x, v)
        assert abs(float((gradient * v).sum() - difference)) < 5e-3 * float((gradient * v).abs().sum())
    assert {"rms_norm_back", "gated_back"} <= set(forced)


def test_gradients_can_be_differentiated_again(forced, monkeypatch):
    """A gradient penalty's gradients, against the modules' own."""
    mlp = tiny_mlp()
    for i, p in enumerate(mlp.parameters()):
        p.data = random(*p.shape, dtype=torch.float32, seed=i, scale=0.3)
    norm = GemmaRMSNorm(40)

    def penalty():
        x = random(3, 40, dtype=torch.float32, seed=9).requires_grad_()
        (first,) = torch.autograd.grad(mlp(norm(x)).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, norm.weight, *mlp.parameters()])

    fused = penalty()
    assert {"rms_norm_saving", "gated"} <= set(forced)
    monkeypatch.setattr(training, "DEVICES", {"cuda"})
    for got, expected in zip(fused, penalty(), strict=True):
        assert far(got, expected) < 1e-5


def test_a_kernel_that_does_not_start_gives_way_to_torch(forced, monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(triton, "_refused", {})
    x, norm = random(3, 40, dtype=torch.float32).requires_grad_(), GemmaRMSNorm(40)
    (expected,) = torch.autograd.grad(norm(x).pow(2).sum(), x)
    y = norm(x)
    monkeypatch.setattr(rowwise, "norm_back", Broken())
    with pytest.warns(UserWarning, match="did not start.*no compiler"):
        (got,) = torch.autograd.grad(y.pow(2).sum(), x)
    assert far(got, expected) < 1e-6
    assert not training.fuses(x)
    assert "no compiler" in training.training_plan("cpu").why


# -- where they stand in for the modules --------------------------------------------------------------------------


def trained(model, steps=2, **more):
    """Losses of a few steps, and where the weights ended."""
    optimizer, losses, ids = torch.optim.SGD(model.parameters(), lr=0.05), [], prompts(2, 9)
    for _ in range(steps):
        loss = model(ids, labels=ids, use_cache=False, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), torch.cat([p.detach().float().flatten() for p in model.parameters()])


# Rounding errors of a float32 step; of bfloat16, 2^-8 passing through two layers and the weights' own rounding.
SAME = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu_erf", "relu", "silu"])
def test_a_model_trains_alike(forced, monkeypatch, act):
    compare(forced, monkeypatch, lambda: tiny_gemma.tiny(hidden_act=act).train(), torch.float32)


def test_a_model_in_bfloat16_trains_alike(forced, monkeypatch):
    compare(forced, monkeypatch, lambda: tiny_gemma.tiny().to(torch.bfloat16).train(), torch.bfloat16)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_a_chunked_loss_go_with_them(forced, monkeypatch, reentrant):
    def model():
        model = tiny_gemma.tiny().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    compare(forced, monkeypatch, model, torch.float32, loss_chunk_size=4)


def test_autocast_goes_with_them(forced, monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        compare(forced, monkeypatch, lambda: tiny_gemma.tiny().train(), torch.bfloat16)


def test_frozen_norms_and_adapters_go_with_them(forced, monkeypatch):
    """A layer as LoRA leaves it: a projection wrapped, all else frozen."""

    class Wrapped(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, torch.nn.Linear(base.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, base.out_features, bias=False)
            for i, p in enumerate((self.down.weight, self.up.weight)):
                p.data = random(*p.shape, dtype=torch.float32, seed=i, scale=0.2)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    def model():
        model = tiny_gemma.tiny().train().requires_grad_(False)
        model.enable_input_require_grads()
        for layer in model.model.layers:
            layer.mlp.up_proj = Wrapped(layer.mlp.up_proj)
        return model

    compare(forced, monkeypatch, model, torch.float32)


def compare(forced, monkeypatch, model, dtype, **more):
    losses, weights = trained(model(), **more)
    assert {"rms_norm_saving", "rms_norm_back", "gated", "gated_back"} == set(forced)
    forced.clear()
    monkeypatch.setattr(training, "DEVICES", {"cuda"})
    expected, ends = trained(model(), **more)
    assert not forced
    assert far(losses, expected) < SAME[dtype]
    assert far(weights, ends) < SAME[dtype]
    assert losses[1] != losses[0]


def test_hooks_see_and_change_what_they_did(forced):
    mlp, x = tiny_mlp(), random(2, 40, dtype=torch.float32)
    for i, p in enumerate(mlp.parameters()):
        p.data = random(*p.shape, dtype=torch.float32, seed=i, scale=0.3)
    mlp.gate_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    seen = []
    mlp.up_proj.register_full_backward_hook(lambda module, to_in, to_out: seen.append(to_out[0].clone()))
    mlp(x.requires_grad_()).sum().backward()
    assert "gated" in forced
    gate, down = mlp.gate_proj.weight, mlp.down_proj.weight
    assert far(seen[0], down.sum(0) * F.gelu(2 * x @ gate.T, approximate="tanh")) < 1e-5


def test_projections_that_give_different_dtypes_meet_in_torch(forced):
    mlp, x = tiny_mlp().to(torch.bfloat16), random(2, 40, dtype=torch.bfloat16)
    for i, p in enumerate(mlp.parameters()):
        p.data = random(*p.shape, dtype=torch.bfloat16, seed=i, scale=0.3)
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: output.float())
    mlp.down_proj.register_forward_pre_hook(lambda module, inputs: inputs[0].bfloat16())
    with torch.no_grad():
        expected = mlp(x)
    assert torch.equal(mlp(x), expected)
    assert not forced


def test_an_activation_of_the_users_own_is_called(forced):
    mlp = tiny_mlp()
    mlp.act_fn = torch.sin
    for p in mlp.parameters():
        p.data = random(*p.shape, dtype=torch.float32, scale=0.3)
    x = random(2, 40, dtype=torch.float32)
    assert torch.equal(mlp(x), mlp.down_proj(mlp.gate_proj(x).sin() * mlp.up_proj(x)))
    assert not forced


class Subclass(torch.Tensor):
    """What a library wraps its tensors in."""


def test_without_gradients_and_in_other_dtypes_the_modules_run(forced):
    norm, x = GemmaRMSNorm(40), random(2, 40, dtype=torch.float32)
    with torch.no_grad():
        norm(x)
    norm(x.double())
    norm(torch.Tensor._make_subclass(Subclass, x))
    norm.double()(x)
    assert not forced
    norm.float()(x)
    assert forced == ["rms_norm_saving"]


def test_transforms_see_torchs_own_operations(forced):
    """grad of torch.func, vmap of it, forward differentiation and tracing give what they gave."""
    norm, x, v = GemmaRMSNorm(40), random(3, 40, dtype=torch.float32), random(3, 40, dtype=torch.float32, seed=2)
    norm.weight.data = random(40, dtype=torch.float32, seed=3)
    X = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((norm(X) * v).sum(), X)
    assert forced == ["rms_norm_saving", "rms_norm_back"]
    forced.clear()
    assert far(torch.func.grad(lambda x: (norm(x) * v).sum())(x), expected) < 1e-6
    each = torch.func.vmap(torch.func.grad(lambda x, v: (norm(x) * v).sum()))(x, v)
    assert far(each, expected) < 1e-6
    _, along = torch.func.jvp(norm, (x,), (v,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        assert far(torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent, along) < 1e-6
    with torch.device("cpu"):  # a default device is no transform
        norm(x)
    assert forced == ["rms_norm_saving"]
    forced.clear()
    traced = torch.jit.trace(norm, (x,), check_trace=False)
    assert not forced
    assert not [node for node in traced.graph.nodes() if node.kind().startswith("gemmakit")]


def test_a_compiler_gets_torchs_own_operations(forced):
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    model, ids = tiny_gemma.tiny(num_hidden_layers=1).train(), prompts(1, 5)
    torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids, use_cache=False).loss.backward()
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert "gemmakit" not in graphs[0]
    assert "rsqrt" in graphs[0]
    assert not forced
