"""What is asked of generate(): settings and the order in which logits are processed. Data; no tensors."""

from gemmakit.generation.config import GenerationConfig
from gemmakit.generation.order import PROCESSOR_ORDER

__all__ = ["PROCESSOR_ORDER", "GenerationConfig"]
