"""Where speed plugs in beneath the one model: each seam is one function, with the plain torch form as its reference."""

from gemmakit.pytorch.kernels.linear import linear, linear_plan
from gemmakit.pytorch.kernels.packed import PackedWeight
from gemmakit.pytorch.kernels.quantized import linear_packed
from gemmakit.pytorch.kernels.training import training_plan

__all__ = ["PackedWeight", "linear", "linear_packed", "linear_plan", "training_plan"]
