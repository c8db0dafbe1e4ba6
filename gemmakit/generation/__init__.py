"""What is asked of generate(): settings, each with its range, and how they act together. Data; no tensors."""

from gemmakit.generation.config import GenerationConfig
from gemmakit.generation.watermarks import (
    BaseWatermarkingConfig,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

__all__ = [
    "BaseWatermarkingConfig",
    "GenerationConfig",
    "SynthIDTextWatermarkingConfig",
    "WatermarkingConfig",
]
