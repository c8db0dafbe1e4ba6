"""Quantized weights: what a scheme must answer, the schemes, and what changes for a model that has one."""

from gemmakit.pytorch.quantize.loading import quantizer_for, replace_with_quantized, stored_parts, unpacked_shapes
from gemmakit.pytorch.quantize.methods import QuantizedMethods
from gemmakit.pytorch.quantize.modules import TABLES, QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from gemmakit.pytorch.quantize.quantizer import Quantizer

__all__ = [
    "TABLES",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMethods",
    "QuantizedWeight",
    "Quantizer",
    "quantizer_for",
    "replace_with_quantized",
    "stored_parts",
    "unpacked_shapes",
]
