"""Checkpoints of every origin as named arrays of the PyTorch layout, read lazily, one tensor at a time.

Names are data: a table a format, in google.py (released PyTorch files), msgpack.py (Flax) and orbax.py (google-deepmind
/gemma). GGUF is a package of its own beside this one.
"""

from gemmakit.checkpoint.formats.opening import TITLES, Weights, open_weights
from gemmakit.checkpoint.formats.orbax import OrbaxFile, is_orbax

__all__ = [
    "TITLES",
    "OrbaxFile",
    "Weights",
    "is_orbax",
    "open_weights",
]
