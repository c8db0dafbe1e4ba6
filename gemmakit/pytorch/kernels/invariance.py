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

# For how many rows results are asked not to depend on each other: none, few or any.
_asked: ContextVar[str] = ContextVar("batch_invariant", default="none")


@contextmanager
def batch_invariant() -> Generator[None]:
    """Within, a token's results on the CPU do not depend on the other tokens of the pass, their number or order, the
    threads, or whether the token is one of a prompt or a decoding step.

    Weights in 8 and 4 bits meet activations in as many bits as their `activation_bits` say, for one row as for many.
    Holds without gradients, for packed passes of what `decode.invariance` finds nothing against: with the native
    kernels, modules of this package alone.
    """
    token = _asked.set("any")
    try:
        yield
    finally:
        _asked.reset(token)


@contextmanager
def rows_alike() -> Generator[None]:
    """Within, the same of passes over up to eight tokens, in the forms that a pass over one takes by itself: codes meet
    activations in 16 bits, or those of 4 bits in their `decode_activation_bits`, however many their `activation_bits`
    are. Longer passes are as they are without it.

    `decode.invariance.steps_alike` says for which models it holds.
    """
    token = _asked.set("few")
    try:
        yield
    finally:
        _asked.reset(token)


def is_batch_invariant() -> bool:
    return not torch.compiler.is_compiling() and _asked.get() == "any"  # a traced graph has no context to ask


def are_rows_alike() -> bool:
    """Under either."""
    return not torch.compiler.is_compiling() and _asked.get() != "none"


def one_by_one(function: Callable[[Tensor], Tensor], x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
    """A function of rows, each computed alone: torch's own choose their form by the number of elements."""
    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        return function(x)
    y = torch.cat([function(row) for row in rows.split(1)])
    return y.view(*x.shape[:-1], y.shape[-1])
