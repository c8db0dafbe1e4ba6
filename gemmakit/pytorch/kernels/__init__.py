"""Where speed plugs in beneath the one model: each seam is one function, with the plain torch form as its reference."""

from gemmakit.pytorch.kernels.linear import linear, linear_plan

__all__ = ["linear", "linear_plan"]
