"""GGUF files without their numbers: the header, read with limits and written; what it says of a model and its words.

Data only: neither torch nor numpy is needed. The tensors themselves are `gemmakit.checkpoint.gguf`'s.
"""

from gemmakit.gguf.header import GgufHeader, GgufTensor, is_gguf, read_gguf_header
from gemmakit.gguf.kinds import KINDS, Kind
from gemmakit.gguf.vocabulary import Entry, Vocabulary

__all__ = ["KINDS", "Entry", "GgufHeader", "GgufTensor", "Kind", "Vocabulary", "is_gguf", "read_gguf_header"]
