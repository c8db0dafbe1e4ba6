"""Checkpoints of every origin in, safetensors, msgpack or GGUF out: kinds of sources joined with kinds of targets."""

from gemmakit.conversion.converting import convert_checkpoint
from gemmakit.conversion.sources import convert_tokenizer

__all__ = ["convert_checkpoint", "convert_tokenizer"]
