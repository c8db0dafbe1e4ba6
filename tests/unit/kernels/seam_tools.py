"""What tests of the fused layers share: steps of a model, how near two of them are, weights in 8 and 4 bits."""

import pytest
import torch

from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.quantize.modules import QuantizedLinear
from gemmakit.pytorch.quantize.rounding import quantize

native = pytest.mark.skipif(cpu.library() is None, reason=f"needs the compiled kernels: {cpu.decision().why}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(model, bits, group):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name.endswith("_proj"):
                packed = quantize(child.weight.detach(), bits, group)
                setattr(module, name, QuantizedLinear(packed, child.bias))
    return model


def near(got, expected, dtype, roundings=1.0, terms=0.0):
    """Within some roundings of the format at each number's size; `terms` for what was summed in another order."""
    room = roundings * torch.finfo(dtype).eps * expected.double().abs() + terms
    worst = float(((got.double() - expected.double()).abs() / (room + 1e-30)).max())
    assert worst <= 1, worst


def steps(model, ids, mask, S, cache, last=3):
    """Logits of the last `last` passes of S positions each, after the rest in one."""
    start = ids.shape[1] - last * S
    seen = lambda end: None if mask is None else mask[:, :end]  # noqa: E731
    model(ids[:, :start], attention_mask=seen(start), past_key_values=cache)
    return torch.cat(
        [
            model(ids[:, at : at + S], attention_mask=seen(at + S), past_key_values=cache).logits
            for at in range(start, ids.shape[1], S)
        ],
        1,
    )


def far(got, expected):
    """The largest difference as a share of the largest number."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


# Of the largest logit. float32: sums in another order. The others: one rounding of hidden states more or less in each
# of the two layers, 8 and 11 bits, carried through projections with weights near 0.2.
FAR = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
