"""Many requests through one model: an engine that a server drives by the step, and generate_batch() on top of it."""

from gemmakit.pytorch.decode.batch.engine import BatchEngine
from gemmakit.pytorch.decode.batch.events import EngineStats, Event, PromptLogprob, Usage
from gemmakit.pytorch.decode.batch.generate import BatchResult, generate_batch
from gemmakit.pytorch.decode.batch.requests import Request

__all__ = [
    "BatchEngine",
    "BatchResult",
    "EngineStats",
    "Event",
    "PromptLogprob",
    "Request",
    "Usage",
    "generate_batch",
]
