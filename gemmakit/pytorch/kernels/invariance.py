"""Results of a token that are equal to the bit whichever other tokens are computed with it.

Matrix products choose their form, and with it the order of their sums, by the number of rows; under `batch_invariant`
those of this package do not, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from gemmakit.pytorch.shapes import Float

_asked: ContextVar[bool] = ContextVar("batch_invariant", default=False)


@contextmanager
def batch_invariant() -> Generator[None]:
    """Within, a token's results on the CPU do not depend on the other tokens of the pass, their number or order, the
    threads, or whether the token is one of a prompt or a decoding step.

    Weights in 8 and 4 bits meet activations in as many bits as their `activation_bits` say, for one row as for many.
    Holds without gradients, for packed passes of what `decode.batch.invariance` finds nothing against: with the native
    kernels, modules of this package alone.
    """
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def is_batch_invariant() -> bool:
    return not torch.compiler.is_compiling() and _asked.get()  # a traced graph has no context to ask


def one_by_one(function: Callable[[Tensor], Tensor], x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
    """A function of rows, each computed alone: torch's own choose their form by the number of elements."""
    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        return function(x)
    y = torch.cat([function(row) for row in rows.split(1)])
    return y.view(*x.shape[:-1], y.shape[-1])
