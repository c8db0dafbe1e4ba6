"""Many requests through one model: an engine that a server drives by the step, and generate_batch() on top of it."""

from gemmakit.pytorch.decode.batch.engine import BatchEngine, Event
from gemmakit.pytorch.decode.batch.generate import BatchResult, generate_batch
from gemmakit.pytorch.decode.batch.requests import Request

__all__ = ["BatchEngine", "BatchResult", "Event", "Request", "generate_batch"]
