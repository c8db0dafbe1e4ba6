"""Files to named arrays and back: safetensors, shards with an index, and pickles where asked for.

Opening checks everything that can be checked without reading a tensor; saving never leaves a half-written checkpoint.
Importing this package loads neither torch nor numpy nor huggingface_hub.
"""

from gemmakit.checkpoint.arrays import LazyTensor, TensorInfo
from gemmakit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from gemmakit.checkpoint.formats.safetensors import read_header
from gemmakit.checkpoint.memory import free_memory_bytes, require_memory
from gemmakit.checkpoint.save import parse_size, save_checkpoint

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "TensorInfo",
    "free_memory_bytes",
    "open_checkpoint",
    "parse_size",
    "read_header",
    "require_memory",
    "save_checkpoint",
]
