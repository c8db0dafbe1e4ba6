"""Quantized weights: what a scheme must answer, the schemes, and what changes for a model that has one."""

from gemmakit.pytorch.quantize.methods import QuantizedMethods
from gemmakit.pytorch.quantize.modules import TABLES, QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from gemmakit.pytorch.quantize.quantizer import Quantizer, adopt, choose, stored_groups, unpacked_shapes

__all__ = [
    "TABLES",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMethods",
    "QuantizedWeight",
    "Quantizer",
    "adopt",
    "choose",
    "stored_groups",
    "unpacked_shapes",
]
