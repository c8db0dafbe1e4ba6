"""Tensors in, tensors out: the products and pointwise parts of the model, each with its plain-torch reference."""

from gemmakit.pytorch.kernels.decision import Decision
from gemmakit.pytorch.kernels.invariance import (
    are_rows_alike,
    batch_invariant,
    is_batch_invariant,
    one_by_one,
    rows_alike,
)
from gemmakit.pytorch.kernels.linear import linear, linear_packed, linear_plan
from gemmakit.pytorch.kernels.packed import PackedWeight
from gemmakit.pytorch.kernels.training import training_plan

__all__ = [
    "Decision",
    "PackedWeight",
    "are_rows_alike",
    "batch_invariant",
    "is_batch_invariant",
    "linear",
    "linear_packed",
    "linear_plan",
    "one_by_one",
    "rows_alike",
    "training_plan",
]
