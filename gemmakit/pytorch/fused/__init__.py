"""Decoder layers by fewer, larger kernels: which layers run so and why (`decide`), by which device's kernels."""

from gemmakit.pytorch.fused.decide import fused_layer, layers_plan

__all__ = ["fused_layer", "layers_plan"]
