"""A weight of codes is a parameter like any other, but for sums with it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import gemmakit
from gemmakit.pytorch.quantize import QuantizedLinear, rounding
from gemmakit.pytorch.quantize.codes import Codes

MERGES = {
    "+=": lambda module, more: setattr(module.weight, "data", module.weight.data.__iadd__(more)),
    "+= of a copy": lambda module, more: setattr(module.weight, "data", module.weight.data.clone().__iadd__(more)),
    "+": lambda module, more: setattr(module.weight, "data", module.weight.data + more),
    "-=": lambda module, more: setattr(module.weight, "data", module.weight.data.__isub__(more)),
    "*": lambda module, more: setattr(module.weight, "data", more * module.weight.data),
    "numbers": lambda module, more: setattr(module.weight, "data", more),
    "rounded numbers": lambda module, more: setattr(module.weight, "data", more.to(module.weight.dtype)),
    "a copy into it": lambda module, more: module.weight.data.copy_(more),
}


@pytest.fixture(params=[8, 4])
def module(request):
    return QuantizedLinear(rounding.quantize(torch.randn(6, 32), request.param, None if request.param == 8 else 32))


@pytest.mark.parametrize("how", MERGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_nothing_is_added_to_codes(how, dtype, module):
    before = module.weight.detach().clone()
    more = torch.full(before.shape, 3.0).to(torch.float32 if "numbers" in how or "into" in how else dtype)
    with pytest.raises(gemmakit.errors.InputError, match=r"call dequantize\(\)"):
        MERGES[how](module, more)
    assert torch.equal(module.weight, before)


def test_copies_pickles_and_moves_keep_it(module):
    packed = io.BytesIO()
    torch.save(module, packed)
    packed.seek(0)
    x = torch.randn(3, 32)
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(packed, weights_only=False)]
    others.append(copy.deepcopy(module).to("cpu"))
    for other in others:
        assert type(other.weight) is Codes and isinstance(other.weight, nn.Parameter)
        assert torch.equal(other(x), module(x))
    assert type(copy.deepcopy(module).to("meta").weight) is Codes


def test_what_is_stored_needs_nothing_of_gemmakit(module):
    packed = io.BytesIO()
    torch.save([module.state_dict(), module.weight], packed)
    assert b"gemmakit" not in packed.getvalue()
    packed.seek(0)
    stored, weight = torch.load(packed, weights_only=True)
    assert torch.equal(stored["weight"], module.weight) and torch.equal(weight, module.weight)
    module.load_state_dict(stored)


def test_its_data_is_computed_with_by_hand(module):
    """As whoever reads codes does: what torch's functions make of them is plain."""
    numbers = module.weight.data.float() * 2.0
    assert type(numbers) is torch.Tensor and torch.equal(numbers, module.weight.float() * 2.0)
