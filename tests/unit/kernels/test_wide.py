"""Products with 16-bit weights in training, as a processor computes them that only emulates such products."""

import pytest
import torch
import torch.nn.functional as F

from gemmakit.pytorch.kernels import linear, wide


@pytest.fixture
def emulating(monkeypatch):
    """As on a processor without 16-bit products, wherever the test runs."""
    monkeypatch.setattr("gemmakit.pytorch.kernels.wide.product_dtype", lambda dtype: torch.float32)
    monkeypatch.setattr("gemmakit.pytorch.kernels.panels.product_dtype", lambda dtype: torch.float32)


def drawn(dtype, rows=(3, 7), O=300, I=64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    return (draw(*rows, I), draw(O, I), draw(O)), draw(*rows, O).detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_those_of_exact_products_rounded_once(emulating, dtype):
    """A sum of 64 in float32 is off by far less than the last place of the result, which is half of what is allowed."""
    given, gradient = drawn(dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = F.linear(*exact)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    found = linear(*given)
    assert found.grad_fn is not None and "linear_wide" in found.grad_fn.name()
    for ours, theirs in zip((found, *torch.autograd.grad(found, given, gradient)), (expected, *wanted), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-5 * float(theirs.abs().max())
        )


def test_a_frozen_weight_has_no_gradient_and_none_of_its_inputs_are_kept(emulating):
    (x, weight, _), gradient = drawn(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = linear(x, weight.detach())
    assert [t.shape for t in kept] == [weight.shape]
    assert torch.autograd.grad(found, x, gradient)[0].shape == x.shape


def test_gradients_are_differentiated_again(emulating):
    (x, weight, bias), _ = drawn(torch.bfloat16)

    def twice(product):
        first = torch.autograd.grad(product(x, weight, bias).float().square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.float().square().sum(), weight)[0].float()

    ours, theirs = twice(linear), twice(F.linear)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02  # four products, each rounded to 8 bits


def test_torchs_own_product_is_taken_where_the_processor_has_one_or_a_compiler_or_a_transform_asks(monkeypatch):
    (x, weight, _), _ = drawn(torch.bfloat16)
    monkeypatch.setattr("gemmakit.pytorch.kernels.wide.product_dtype", lambda dtype: dtype)
    assert not wide.widens(x, weight)
    monkeypatch.setattr("gemmakit.pytorch.kernels.wide.product_dtype", lambda dtype: torch.float32)
    assert wide.widens(x, weight) and not wide.widens(x.float(), weight)
    with torch.no_grad():
        assert not wide.widens(x, weight)
    seen = []
    torch.func.grad(lambda t: seen.append(wide.widens(t, weight)) or t.float().sum())(x.detach())
    assert seen == [False]
