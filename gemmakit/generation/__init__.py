"""What is asked of generate(): settings and the order in which logits are processed. Data; no tensors."""

from gemmakit.generation.config import GenerationConfig
from gemmakit.generation.rules import PROCESSOR_ORDER
from gemmakit.generation.watermarks import (
    BaseWatermarkingConfig,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

__all__ = [
    "PROCESSOR_ORDER",
    "BaseWatermarkingConfig",
    "GenerationConfig",
    "SynthIDTextWatermarkingConfig",
    "WatermarkingConfig",
]
